"""Sequences of a batch laid end to end in one row, each attending to itself alone: no padding and no T x T mask."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longgrpo.model.load import backbone, base_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NAME = "longgrpo_packed"


@dataclass(frozen=True)
class PackedBatch:
    """N tokens of B sequences, laid end to end."""

    input_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [B+1] int32, on input_ids' device: sequence b is [cu_seqlens[b], cu_seqlens[b+1])


def use_packed_attention(model: PreTrainedModel | PeftModel) -> None:
    """Makes packed_hidden possible on `model`, PEFT or not. Until another implementation is set
    (model.set_attn_implementation), the model takes packed batches alone."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    base_model(model).set_attn_implementation(NAME)


def packed_hidden(model: PreTrainedModel | PeftModel, batch: PackedBatch) -> Tensor:
    """The final hidden states, [N, H] in the model's dtype: the head turns row i into the distribution of token i + 1.

    Differentiable, with gradient checkpointing or without. Raises ValueError where use_packed_attention was not called,
    for another attention would let the sequences see each other.
    """
    if base_model(model).config._attn_implementation != NAME:
        raise ValueError("packed_hidden needs use_packed_attention(model) first")
    longest = int(batch.cu_seqlens.diff().max())
    output = backbone(model)(
        input_ids=batch.input_ids[None],  # [1, N]
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=longest,
        max_length_k=longest,
    )
    return output.last_hidden_state[0]


def _attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, N, D]
    key: Tensor,  # [1, kv_heads, N, D]
    value: Tensor,  # [1, kv_heads, N, D]
    attention_mask: None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; returns [1, N, heads, D]."""
    if cu_seq_lens_q is None:
        raise ValueError("this model attends over packed batches alone: call it through packed_hidden")
    window = options.get("sliding_window")
    if window is not None and window < max_length_q:
        raise NotImplementedError(f"a sliding window of {window} under a sequence of {max_length_q} tokens")
    if dropout or options.get("softcap") or options.get("s_aux") is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention with dropout, a softcap or sinks")
    # The flash kernel behind varlen_attn takes the half types alone.
    if query.is_cuda and query.dtype != torch.float32:
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling)[None], None
    lengths = [end - start for start, end in pairwise(cu_seq_lens_q.tolist())]
    # split and not slices: its backward is one concatenation, that of a slice is as long as the whole row.
    sequences = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    rows = [sdpa(q, k, v, is_causal=True, scale=scaling, enable_gqa=True) for q, k, v in sequences]
    return torch.cat(rows, dim=2).transpose(1, 2), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    out = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest,
        scale=scale, window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out
