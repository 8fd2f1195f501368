"""The updates of a rollout, planned on the host: which samples each trains on, packed, and what its loss divides by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longgrpo.config.run import TrainConfig
from longgrpo.loss import loss_normalizer
from longgrpo.model.masters import balanced
from longgrpo.tasks.sample import Rollout
from longgrpo.train.packing import MicroBatch, pack, parts_of
from longgrpo.train.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Update:
    """One optimizer step."""

    batches: list[MicroBatch]  # on the device
    normalizer: float
    """What the loss of the whole update divides by, so that its split into micro-batches changes nothing."""
    trains: bool
    """Whether any sample has a gradient. If none has, one micro-batch is scored anyway: every step compares
    engine and trainer."""
    tokens: int
    """Completion tokens that are trained on, by all ranks."""


def plan_updates(
    config: TrainConfig, rollout: Rollout, device: torch.device, parts: int | None = None, ranks: Ranks = ALONE
) -> list[Update]:
    """The updates of one pass over the rollout, train.minibatches of them unless `parts` says otherwise; its tensors go
    to the device here, and only here. A rank gets the micro-batches of its share, the rest is of all."""
    parts = config.train.minibatches if parts is None else parts
    counted = in_loss(config, rollout)
    active = _with_gradient(config, rollout, counted)

    def update(part: int) -> Update:
        def own(indices: Sequence[int]) -> list[int]:
            return [i for i in indices if rollout.samples[i].group % parts == part]

        return _update(config, rollout, own(range(len(rollout.samples))), own(counted), own(active), device, ranks)

    return [update(part) for part in range(parts)]


def batches_of(
    config: TrainConfig, rollout: Rollout, indices: Sequence[int], device: torch.device, ranks: Ranks = ALONE
) -> list[MicroBatch]:
    """The samples `indices`, packed, on the device: of several ranks this one's share, whoever sampled them.

    The micro-batches are those of one rank, so that the gradient is the same sum in another order. Only if there are
    fewer than ranks each packs groups of its own.
    """
    budget, shared = config.train.token_budget, config.memory.share_prompts
    parts = parts_of(rollout, indices, budget, shared)
    if len(parts) < ranks.world:
        parts = parts_of(rollout, _own_groups(rollout, indices, ranks), budget, shared)
    elif ranks.world > 1:
        lengths = [sum(len(rollout.samples[i].completion.token_ids) for i in part) for part in parts]
        owners = balanced(lengths, ranks.world)
        parts = [part for part, rank in zip(parts, owners, strict=True) if rank == ranks.rank]
    return [pack(rollout, part, share_prompts=shared).to(device) for part in parts]


def _update(
    config: TrainConfig,
    rollout: Rollout,
    every: Sequence[int],
    counted: Sequence[int],
    active: Sequence[int],
    device: torch.device,
    ranks: Ranks,
) -> Update:
    """every, counted, active: the update's samples, those of the loss, and those with a gradient."""
    if active or not ranks.is_first:
        batches = batches_of(config, rollout, active, device, ranks)
    else:
        batches = batches_of(config, rollout, every, device)[:1]
    tokens = sum(len(rollout.samples[i]) for i in counted)
    return Update(
        batches,
        float(loss_normalizer(config.loss, len(every), tokens, config.rollout.max_completion_length)),
        bool(active),
        sum(len(rollout.samples[i]) for i in active),
    )


def _own_groups(rollout: Rollout, indices: Sequence[int], ranks: Ranks) -> list[int]:
    """Of the samples `indices` the groups of this rank, all with about as many tokens."""
    lengths: Counter[int] = Counter()
    for i in indices:
        lengths[rollout.samples[i].group] += len(rollout.samples[i].completion.token_ids)
    rank_of = dict(zip(lengths, balanced(list(lengths.values()), ranks.world), strict=True))
    return [i for i in indices if rank_of[rollout.samples[i].group] == ranks.rank]


def in_loss(config: TrainConfig, rollout: Rollout) -> list[int]:
    """The samples that the loss counts."""
    masked = config.train.mask_truncated
    samples = rollout.samples
    return [i for i, s in enumerate(samples) if not (s.failed or (masked and s.completion.finish_reason == "length"))]


def _with_gradient(config: TrainConfig, rollout: Rollout, counted: Sequence[int]) -> list[int]:
    loss = config.loss
    if loss.beta != 0 or loss.has_entropy_bonus or loss.function:  # these reach samples of advantage 0 as well
        return list(counted)
    if rollout.turn_advantages is not None:
        return [i for i in counted if rollout.turn_advantages[i].any()]
    advantages = rollout.advantages.flatten().tolist()
    return [i for i in counted if advantages[i] != 0]
