"""The tokens of a loss, checked and flat, as the ops take them; and the rows that a GPU's pass may leave out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longgrpo._ops.library import ops
from longgrpo.loss.config import GRPOLossConfig, OffPolicyCorrection, loss_normalizer, packed
from longgrpo.loss.devices import on_device
from longgrpo.loss.tokens import LossTokens
from longgrpo.loss.types import loss_type


class FlatTokens(NamedTuple):
    """float32, in the order of the ops' arguments."""

    weight: Tensor  # [N], 0 outside the mask
    advantages: Tensor  # [N]
    old_logp: Tensor | None  # [N]
    ref_logp: Tensor | None  # [N]
    importance: Tensor | None  # [N]
    sampling_logp: Tensor | None  # [N]
    cu_seqlens: Tensor | None  # [S + 1] int32

    def at(self, rows: Rows, index: Tensor) -> FlatTokens:
        """The tokens of `rows`; index: their order, on the tokens' device."""
        per_token = (None if t is None else t.index_select(0, index) for t in self[:-1])
        return FlatTokens._make((*per_token, on_device(index.device, rows.cu_seqlens)))


def flatten(
    tokens: LossTokens,
    shape: torch.Size,
    normalizer: float | Tensor | None,
    correction: OffPolicyCorrection,
    config: GRPOLossConfig,
) -> FlatTokens:
    """Checks and flattens everything that has one entry a token or a sequence. shape: target's, [N] or [B, T]."""
    needs_sequences = config.needs_sequences or correction.needs_sequences
    cu_seqlens = _sequence_bounds(tokens, shape, normalizer, needs_sequences, config)
    _check_combination(tokens, correction, config)
    for name in ("mask", "old_logp", "ref_logp", "sampling_logp"):
        tensor = getattr(tokens, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} {list(tensor.shape)} must be of target's shape {list(shape)}")
    if isinstance(normalizer, int | float) and not normalizer > 0:
        raise ValueError(f"normalizer must be > 0, got {normalizer}")
    mask = tokens.mask
    if mask is None:
        mask = torch.ones(shape.numel(), dtype=torch.bool, device=tokens.advantages.device)
    advantages = _spread("advantages", tokens.advantages, shape, cu_seqlens)
    assert advantages is not None
    return FlatTokens(
        token_weights(mask.reshape(-1).bool(), cu_seqlens, config, normalizer),
        advantages,
        _flat(tokens.old_logp),
        _flat(tokens.ref_logp) if config.beta else None,
        _spread("importance", tokens.importance, shape, cu_seqlens),
        _flat(tokens.sampling_logp),
        cu_seqlens,
    )


def token_weights(
    mask: Tensor, cu_seqlens: Tensor | None, config: GRPOLossConfig, normalizer: float | Tensor | None
) -> Tensor:
    """w_t of every token: the loss is sum_t w_t (policy_t + beta kl_t - entropy_coef entropy_t).

    Args:
        mask: [N] bool, the tokens of the loss.
        cu_seqlens: [S + 1], the bounds of the sequences; may be None if the loss type knows no sequences.
        normalizer: what the loss divides by instead of this call's own count.

    Returns: [N] float32, 0 outside the mask.
    """
    ones = mask.float()
    if normalizer is None:
        sequences = 1 if cu_seqlens is None else cu_seqlens.numel() - 1
        normalizer = loss_normalizer(config, sequences, ones.sum())
    weight = ones / normalizer
    if loss_type(config.loss_type).mean == "sequence":
        assert cu_seqlens is not None
        bounds = cu_seqlens.long()
        before = torch.nn.functional.pad(ones.cumsum(0, dtype=torch.float64), (1, 0))[bounds]
        weight = weight / per_token(before.diff().clamp(min=1).float(), bounds, mask.numel())
    return weight


def per_token(per_sequence: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[S] -> [N] without asking the device how long the sequences are."""
    return per_sequence.repeat_interleave(cu_seqlens.diff(), output_size=tokens)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().reshape(-1).contiguous()


def _spread(name: str, tensor: Tensor | None, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor | None:
    """[N] from one entry a sequence, or from the tokens' own shape; the former if both fit."""
    if tensor is None:
        return None
    sequences = None if cu_seqlens is None else cu_seqlens.numel() - 1
    if cu_seqlens is not None and tensor.shape == (sequences,):
        return per_token(tensor.detach().float(), cu_seqlens, shape.numel())
    if tensor.shape == shape:
        return _flat(tensor)
    raise ValueError(f"{name} {list(tensor.shape)} needs one entry for each of the {sequences} sequences, or to be "
                     f"of target's shape {list(shape)}")  # fmt: skip


def _sequence_bounds(
    tokens: LossTokens,
    shape: torch.Size,
    normalizer: float | Tensor | None,
    needs_sequences: bool,
    config: GRPOLossConfig,
) -> Tensor | None:
    """[S + 1] int32 bounds of the sequences in the flat tokens, or None if nothing asks for them."""
    advantages, cu_seqlens = tokens.advantages, tokens.cu_seqlens
    if len(shape) == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens belongs to flat tokens [N]; padded tokens [B, T] have their rows")
        rows, length = shape
        return torch.arange(rows + 1, dtype=torch.int32, device=advantages.device) * length
    if cu_seqlens is None:
        row = loss_type(config.loss_type)
        counts = row.mean == "sequence" or (row.divides_by != "tokens" and not normalizer)
        if needs_sequences or counts or advantages.shape != shape:
            raise ValueError(f"flat tokens need cu_seqlens [sequences + 1] for loss_type={config.loss_type!r}, "
                             f"importance_level={config.importance_level!r}, this correction and advantages "
                             f"{list(advantages.shape)}")  # fmt: skip
        return None
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must be [sequences + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.long()
        if int(bounds[0]) != 0 or int(bounds[-1]) != shape[0] or bool((bounds.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to the {shape[0]} tokens, got {bounds.tolist()[:8]}...")
    return cu_seqlens.to(torch.int32).contiguous()


def _check_combination(tokens: LossTokens, correction: OffPolicyCorrection, config: GRPOLossConfig) -> None:
    if config.beta and not config.exact_kl and tokens.ref_logp is None:
        raise ValueError(f"beta={config.beta} with kl={config.kl!r} needs ref_logp")
    if tokens.old_logp is not None and not config.detach:
        raise ValueError("detach=False is about the on-policy ratio exp(logp - logp): leave old_logp out")
    if correction.importance != "none" and tokens.sampling_logp is None:
        raise ValueError(f"importance={correction.importance!r} corrects by old_logp - sampling_logp: hand in "
                         "sampling_logp, or take importance='none'")  # fmt: skip


# ---- rows that a GPU's pass may leave out ----


class Rows(NamedTuple):
    """The tokens that a pass has to visit, if the host knows them."""

    order: Tensor  # [M] int64 into the N flat tokens, on the host: first those that may have a gradient
    active: int  # how many those are
    cu_seqlens: Tensor | None  # [S + 1] int32 bounds among the M, if the loss asks for sequences


def rows_known_on_host(
    shape: torch.Size, advantages: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, config: GRPOLossConfig,
    needs_sequences: bool, metrics: bool,
) -> Rows | None:  # fmt: skip
    """What a GPU cannot be asked for without waiting for it. None if the host does not know, or nothing is saved."""
    if any(t is not None and t.device.type != "cpu" for t in (advantages, mask, cu_seqlens)):
        return None
    tokens = shape.numel()
    visited = torch.ones(tokens, dtype=torch.bool) if mask is None else mask.reshape(-1).bool()
    if len(shape) == 2:
        cu_seqlens = torch.arange(shape[0] + 1) * shape[1]
    if needs_sequences:  # a sequence stays whole and in its place
        if cu_seqlens is None:
            return None  # an error that flatten names
        before = torch.nn.functional.pad(visited.cumsum(0), (1, 0))
        index, bounds = visited.nonzero()[:, 0], before[cu_seqlens.long()].int()
        return Rows(index, len(index), bounds) if len(index) < tokens else None
    of_token = _spread("advantages", advantages, shape, cu_seqlens)
    index, active = ops.visited_rows(visited.float(), of_token, *packed(config, OffPolicyCorrection()), metrics)
    return Rows(index, active, None) if active < tokens else None
