"""Sequences of a batch laid end to end in one row, each attending to itself alone: no padding and no T x T mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PackedBatch:
    """N tokens of B sequences, laid end to end."""

    input_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [B+1] int32, on input_ids' device: sequence b is [cu_seqlens[b], cu_seqlens[b+1])


def use_packed_attention(model: PreTrainedModel | PeftModel) -> None:
    """Makes packed_hidden possible on `model`."""
    raise NotImplementedError


def packed_hidden(model: PreTrainedModel | PeftModel, batch: PackedBatch) -> Tensor:
    """The final hidden states, [N, H] in the model's dtype: row i is what the head turns into the distribution of token i + 1."""
    raise NotImplementedError
