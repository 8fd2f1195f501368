"""The model to train, and its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4"]


@dataclass(frozen=True)
class ModelConfig:
    """The model to train."""

    path: str
    """A directory in the Hugging Face format, a .gguf file (the first of its shards), a hub id, or
    "smollm2-135m-instruct"."""
    dtype: Dtype = "float32"
    """Type of the weights that the engine and the trainer share."""
    quantization: Quantization | None = None
    """nf4: linear layers in bitsandbytes' 4 bits, for LoRA (longgrpo.model.nf4); null: all weights in `dtype`."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter, as in PEFT. It has no dropout, because the rollout samples without dropout and the importance
    ratio compares the two."""

    rank: int = 16
    """The rank of its two factors."""
    alpha: int = 16
    """The adapter is scaled by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """all-linear (every linear layer except the head), or module names."""
    mode: Literal["auto", "merge", "views", "copy"] = "auto"
    """How the adapter reaches vLLM (longgrpo.rollout.adapters); auto takes the fastest safe mode."""
    path: str | None = None
    """An adapter as PEFT saves it, with which training begins; its rank, alpha and targets take the place of those
    above. A KL term compares with it."""
    merged: str | None = None
    """An adapter that is merged into the base before training: the new one is stacked on it."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
