"""What a config cannot ask of a model, before anything is counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from longgrpo.memory.cards import GIB
from longgrpo.memory.phases import Rows
from longgrpo.memory.shape import ModelShape
from longgrpo.model.grouped_attention import check_family

if TYPE_CHECKING:
    from longgrpo.config.run import TrainConfig


def check(config: TrainConfig, shape: ModelShape, rows: Rows) -> None:
    if config.memory.attention_heads is not None:
        check_family(shape.kind)
    if rows.longest > shape.context:
        raise ValueError(
            f"a sequence of {rows.longest} tokens: the positions of this {shape.kind} model reach {shape.context}; "
            "lower rollout.max_model_len or rollout.max_completion_length"
        )
    if shape.sliding_window and rows.longest > shape.sliding_window:
        raise ValueError(
            f"a sequence of {rows.longest} tokens under a sliding window of {shape.sliding_window}: the trainer has no "
            "windowed attention; lower rollout.max_model_len"
        )
    cache = int(config.rollout.kv_cache_gib * GIB)
    one = kv_bytes(config, shape, rows.longest)
    if config.rollout.engine != "transformers" and one > cache:
        raise ValueError(
            f"rollout.kv_cache_gib = {config.rollout.kv_cache_gib:g}: one sequence of {rows.longest} tokens needs "
            f"{one / GIB:.2f} GiB; raise it, set rollout.kv_cache_dtype: fp8 or lower rollout.max_model_len"
        )


def kv_bytes(config: TrainConfig, shape: ModelShape, tokens: int) -> int:
    """Keys and values of a sequence in the rollout engine."""
    element = 1 if config.rollout.kv_cache_dtype == "fp8" else element_of(config)
    return 2 * element * shape.layers * shape.kv_width * tokens


def dtype_of(config: Any) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    return dtype


def element_of(config: Any) -> int:
    """Bytes of a number of the model."""
    return dtype_of(config).itemsize
