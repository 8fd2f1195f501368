"""A model small enough to train in milliseconds, with a tokenizer of characters, written as any model on disk is."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

# The tiny model gains nothing from more threads, and would wait for them on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{{ '<end>' if message['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny-llama")
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE
    )
    wrapped.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=vocabulary["<end>"],
        pad_token_id=vocabulary["<pad>"],
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def tree(base_tree: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(base_tree)


@pytest.fixture(scope="session")
def base_tree(tiny_model: Path) -> dict[str, Any]:
    """A config as YAML gives it: every completion's letter count is its reward, so that groups have spread."""
    return {
        "model": {"path": str(tiny_model)},
        "lora": {"rank": 4, "alpha": 4},
        "task": {
            "name": "chain_sum",
            "parameters": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            "eval_n": 8,
            "eval_reward": "score_answer",
        },
        "rewards": [{"function": f"{Path(__file__).parent / 'own_rewards.py'}:digits"}],
        "rollout": {"engine": "transformers", "num_generations": 4, "max_completion_length": 6},
        "train": {"steps": 4, "prompts_per_step": 3, "learning_rate": 1e-2, "probe_prompts": 2, "save_steps": 2},
    }
