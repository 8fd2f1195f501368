"""Small random models, built in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from testing.tokenizer import character_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

transformers = pytest.importorskip("transformers")
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)


def random_model(architecture: str, **options: Any) -> PreTrainedModel:
    """A model of this `model_type`, the same on every call; `options` of its config go before `SIZES`."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **SIZES | options)
    return transformers.AutoModelForCausalLM.from_config(config)


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def write_tiny_llama(directory: Path, **options: Any) -> Path:
    """A Llama and its tokenizer as any model on disk is; returns the directory."""
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(directory)
    tokens = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    random_model("llama", vocab_size=len(tokenizer), **tokens, **options).save_pretrained(directory)
    return directory
