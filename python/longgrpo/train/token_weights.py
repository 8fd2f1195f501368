"""Weights of the policy term, token by token: grpo_loss takes their product as `importance`.

All functions take packed sequences: values [M] f32 of the tokens of S sequences, cu_seqlens [S+1] their bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.run import TrainConfig
from longgrpo.loss.flatten import per_token
from longgrpo.train.packing import MicroBatch


def policy_weights(config: TrainConfig, batch: MicroBatch, logp: Tensor) -> Tensor | None:
    """[M] f32, or None where every token counts alike. logp: the policy's, detached."""
    old_logp = batch.per_token("old_logp")
    old_logp = logp if old_logp is None else old_logp
    weights = [batch.per_token("policy_weight")]
    if config.rollout.importance != "none":
        weights.append(engine_weight(engine_ratio(old_logp, batch, config.rollout), config.rollout))
    threshold = config.train.off_policy_threshold
    if threshold is not None:
        weights.append(near_policy(threshold, logp, old_logp, batch.advantages, batch.cu_seqlens))
    present = [weight for weight in weights if weight is not None]
    return torch.stack(present).prod(0) if present else None


def engine_ratio(logp: Tensor, batch: MicroBatch, config: RolloutConfig) -> Tensor:
    """pi_trainer / pi_engine [M] of the sampled tokens, both scored on the same support. logp [M]: the trainer's.

    At the level of sequences it is the exponential of their mean over tokens: a product over a long one would leave any
    bound.
    """
    difference = logp - batch.engine_logp
    if config.importance.startswith("sequence"):
        lengths = batch.cu_seqlens.diff().clamp(min=1)
        difference = per_token(_sums(difference, batch.cu_seqlens) / lengths, batch.cu_seqlens, len(logp))
    return difference.exp()


def engine_weight(ratio: Tensor, config: RolloutConfig) -> Tensor:
    """The ratio [M] cut at the cap (truncated importance sampling) or, outside of [1 / cap, cap], 0 (masked); 1 where
    the ratio is not to count."""
    cap = config.importance_cap
    if config.importance == "none":
        return torch.ones_like(ratio)
    if config.importance.endswith("truncate"):
        return ratio.clamp(max=cap)
    return ratio.masked_fill((ratio > cap) | (ratio < 1 / cap), 0.0)


def near_policy(
    threshold: float, logp: Tensor, old_logp: Tensor, advantages: Tensor, cu_seqlens: Tensor
) -> Tensor:  # fmt: skip
    """0 for the tokens of sequences with a negative advantage whose mean of old_logp - logp exceeds the threshold."""
    lengths = cu_seqlens.diff().clamp(min=1)
    moved = _sums(old_logp - logp, cu_seqlens) / lengths  # [S]
    kept = (advantages >= 0) | (moved <= threshold)
    return per_token(kept.float(), cu_seqlens, len(logp))


def entropy_threshold(entropies: Tensor, share: float) -> float:
    """The entropy from which on a token is among the `share` of tokens of the highest entropy. entropies: [M]."""
    return torch.quantile(entropies.float(), 1 - share).item()


def _sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[M] -> [S] f32; float64 within, for the sums are differences of a running one."""
    running = torch.nn.functional.pad(values.cumsum(0, dtype=torch.float64), (1, 0))
    return running[cu_seqlens.long()].diff().float()
