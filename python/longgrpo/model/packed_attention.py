"""Sequences of a batch laid end to end in one row, each attending only to itself: no padding and no T x T mask."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longgrpo.loss.devices import on_device
from longgrpo.model.head import base_model
from longgrpo.model.load import backbone

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

NAME = "longgrpo_packed"
ATTENTION = "_longgrpo_attention"  # of an attention layer: what computes it in place of attend_packed
KEEPS_APART = "_longgrpo_keeps_apart"  # of a model: whether its layers keep packed sequences apart


@dataclass(frozen=True)
class PackedBatch:
    """N tokens of B sequences, laid end to end; `pack_sequences` makes one.

    A sequence may go on from another, its prefix: the completions of one prompt then share the prompt's tokens in every
    layer but attention, which sees each sequence with its prefix before it, K tokens in all. Bounds are on the host as
    well, so that no layer has to ask the device for them.
    """

    input_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64, from 0 in each sequence without a prefix; others go on from their prefix's
    cu_seqlens: Tensor  # [B+1] int32: sequence b has the K rows of attention [cu_seqlens[b], cu_seqlens[b+1])
    lengths: Sequence[int]  # B: their differences
    shared_rows: Tensor | None = None  # [K] int64 into the N tokens; None: no sequence has a prefix, and K is N
    own_rows: Tensor | None = None  # [N] int64: the positions of the N tokens within the K rows
    own_lengths: Sequence[int] = ()  # B: how many of the N tokens each sequence has

    def to(self, device: torch.device) -> PackedBatch:
        """On `device`, without waiting for it."""
        moved: dict[str, Any] = {
            name: on_device(device, value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    def sequences(self) -> Iterator[PackedBatch]:
        """Each sequence, with its prefix, as a batch of its own; K rows in all."""
        ids, positions = self.input_ids, self.position_ids
        if self.shared_rows is not None:
            ids, positions = ids[self.shared_rows], positions[self.shared_rows]
        for start, end in pairwise([0, *accumulate(self.lengths)]):
            yield pack_sequences(ids[start:end], positions[start:end], [0, end - start])


def pack_sequences(
    input_ids: Tensor, position_ids: Tensor, bounds: Sequence[int], prefix: Sequence[int] | None = None
) -> PackedBatch:
    """N tokens (both [N] int64) as B sequences, sequence b being [bounds[b], bounds[b+1]). `prefix`: of each the index
    of the sequence that it continues, -1 for none; a prefix has none itself. None: no sequence has one."""
    if prefix is None:
        lengths = [end - start for start, end in pairwise(bounds)]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        return PackedBatch(input_ids, position_ids, cu_seqlens, lengths, own_lengths=lengths)
    spans = [torch.arange(start, end) for start, end in pairwise(bounds)]
    whole = [
        torch.cat((spans[before], span)) if before >= 0 else span for span, before in zip(spans, prefix, strict=True)
    ]
    lengths = [len(rows) for rows in whole]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)  # [B+1]
    own = [torch.arange(end - len(span), end) for span, end in zip(spans, ends[1:].tolist(), strict=True)]
    own_lengths = [len(span) for span in spans]
    return PackedBatch(input_ids, position_ids, ends, lengths, torch.cat(whole), torch.cat(own), own_lengths)


def use_packed_attention(model: PreTrainedModel | PeftModel) -> None:
    """Makes packed_hidden possible on `model`, PEFT or not. Until another implementation is set
    (model.set_attn_implementation), the model takes only packed batches.

    A model with layers that carry a state from one token to the next, past the bounds of a sequence (convolutions,
    linear attention, Mamba), is found by a trial, and packed_hidden then runs each sequence by itself.

    Raises NotImplementedError for an attention that this one does not replace: Gemma 2's caps its scores, gpt-oss has
    sinks, BLOOM's cannot be exchanged.
    """
    from transformers import AttentionInterface

    base = base_model(model)
    if cap := getattr(base.config.get_text_config(), "attn_logit_softcapping", None):
        raise NotImplementedError(
            f"{type(base).__name__} caps its attention's scores (attn_logit_softcapping = {cap}), which packed "
            "attention does not do: use a model without"
        )
    # Without a mask function of this name transformers makes no mask, and does not look for packed sequences itself.
    AttentionInterface.register(NAME, _attention)
    base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:
        raise NotImplementedError(f"{type(base).__name__} has an attention of its own, which takes no packed sequences")
    apart = _keeps_apart(model)
    setattr(base, KEEPS_APART, apart)
    if not apart:
        log.info("%s has layers with a state over the sequence: sequences run one by one", type(base).__name__)


@torch.no_grad()
def _keeps_apart(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the second of two sequences stays as it is if the first changes."""
    base = base_model(model)
    if base.device.type == "meta":
        return True
    length = 4  # within any sliding window
    ids, positions = torch.arange(length) % base.config.get_text_config().vocab_size, torch.arange(length)
    first, second = (
        _hidden(model, pack_sequences(torch.cat((before, ids)), positions.repeat(2), [0, length, 2 * length]))
        for before in (ids, ids.flip(0))
    )
    first, second = first[length:].float(), second[length:].float()
    # Nothing changes in a dense model. Experts get other shapes, whose rounding differs.
    tolerance = 0.02 if base.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return bool((first - second).abs().max() <= tolerance * first.abs().max())


def packed_hidden(model: PreTrainedModel | PeftModel, batch: PackedBatch) -> Tensor:
    """The final hidden states, [N, H] in the model's dtype: the head turns row i into the distribution of token i + 1.

    Differentiable, with gradient checkpointing or without. Raises ValueError if use_packed_attention was not called,
    for another attention would let the sequences see each other.
    """
    if base_model(model).config._attn_implementation != NAME:
        raise ValueError("packed_hidden needs use_packed_attention(model) first")
    if getattr(base_model(model), KEEPS_APART):
        return _hidden(model, batch)
    hidden = torch.cat([_hidden(model, sequence) for sequence in batch.sequences()])  # [K, H]
    return hidden if batch.own_rows is None else hidden.index_select(0, batch.own_rows.to(hidden.device))


def _hidden(model: PreTrainedModel | PeftModel, batch: PackedBatch) -> Tensor:
    batch = batch.to(base_model(model).device)
    longest = max(batch.lengths)
    output = backbone(model)(
        input_ids=batch.input_ids[None],  # [1, N]
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=longest,
        max_length_k=longest,
        lengths=batch.lengths,
        shared_rows=batch.shared_rows,
        own_rows=batch.own_rows,
        own_lengths=batch.own_lengths,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


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
    lengths: Sequence[int] = (),
    shared_rows: Tensor | None = None,
    own_rows: Tensor | None = None,
    own_lengths: Sequence[int] = (),
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; returns [1, N, heads, D]."""
    if cu_seq_lens_q is None:
        raise ValueError("this model attends only over packed batches: call it through packed_hidden")
    window = options.get("sliding_window")
    if window is not None and window < max_length_q:
        raise NotImplementedError(f"a sliding window of {window} under a sequence of {max_length_q} tokens")
    if dropout or options.get("softcap") or options.get("s_aux") is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention with dropout, a softcap or sinks")
    if attend := getattr(module, ATTENTION, None):
        return attend(query, key, value, cu_seq_lens_q, lengths, own_lengths, shared_rows, own_rows, scaling), None
    return attend_packed(query, key, value, cu_seq_lens_q, lengths, shared_rows, own_rows, scaling), None


def attend_packed(
    query: Tensor,  # [1, heads, N, D]
    key: Tensor,  # [1, kv_heads, N, D]
    value: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    shared_rows: Tensor | None,
    own_rows: Tensor | None,
    scale: float | None,
) -> Tensor:
    """[1, N, heads, D] of the sequences of a PackedBatch, by torch's attention."""
    query, key, value = _behind_prefixes(query, key, value, shared_rows)
    if _takes_varlen(query):
        return _own(_varlen(query, key, value, cu_seqlens, max(lengths), scale)[None], own_rows)
    return _own(_one_by_one(query, key, value, lengths, scale), own_rows)


def _behind_prefixes(query: Tensor, key: Tensor, value: Tensor, shared_rows: Tensor | None) -> tuple[Tensor, ...]:
    """A prefix is laid before each of its sequences: plain causal attention needs no mask."""
    return tuple(x if shared_rows is None else x.index_select(2, shared_rows) for x in (query, key, value))


def _own(out: Tensor, own_rows: Tensor | None) -> Tensor:
    return out if own_rows is None else out.index_select(1, own_rows)


def _takes_varlen(query: Tensor) -> bool:
    """The flash kernel behind varlen_attn takes only the half types, from Ampere on. On meta a dry run counts what a
    GPU would hold."""
    if query.is_cuda:
        return query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return query.is_meta


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None) -> Tensor:
    """[1, N, heads, D]"""
    # split and not slices: its backward is one concatenation, that of a slice is as long as the whole row.
    sequences = zip(*(x.split(list(lengths), dim=2) for x in (query, key, value)), strict=True)
    rows = [sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True) for q, k, v in sequences]
    return torch.cat(rows, dim=2).transpose(1, 2)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, D]
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if _groups_heads(varlen_attn):
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out = varlen_attn(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(-1, 0), **options
    )
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _groups_heads(attention: Callable[..., Any]) -> bool:
    """torch 2.11's varlen_attn needs as many heads of keys as of queries."""
    return "enable_gqa" in inspect.signature(attention).parameters
