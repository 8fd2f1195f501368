"""The head over several ranks: gathered where it is a DTensor, or sharded over the vocabulary by tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gathered(torch.autograd.Function):
    """The whole of a DTensor. Its gradient is the mean over the ranks, as FSDP's: each has seen its own tokens."""

    @staticmethod
    def forward(ctx: Any, sharded: Any) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        whole: Tensor = sharded.full_tensor()
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        partial = [Partial()] * ctx.mesh.ndim
        mean = gradient / ctx.mesh.size()
        return DTensor.from_local(mean, ctx.mesh, partial, run_check=False).redistribute(placements=ctx.placements)


def whole(tensor: Tensor) -> Tensor:
    """`tensor` itself, or all of it on every rank where it is a DTensor (FSDP2's fully_shard)."""
    # Asked by attribute: torch.distributed.tensor takes longer to import than all of longgrpo.
    if not hasattr(tensor, "full_tensor"):
        return tensor
    gathered: Tensor = _Gathered.apply(tensor)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return gathered


class _Replicated(torch.autograd.Function):
    """Tokens that every rank of the group holds: each has part of their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.float()  # the sum over the ranks is rounded once
        total = total.clone() if total is gradient else total
        dist.all_reduce(total, group=ctx.group)
        return total.to(gradient.dtype), None


class _FromAllRanks(torch.autograd.Function):
    """[...] -> [ranks, ...]. Every rank goes on with the same computation, so each keeps its own gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank = dist.get_rank(group)
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.rank], None


class VocabularyShard:
    """One rank's rows of the head: what it is asked for, and how the ranks' answers make the log-probability.

    Rank r has the logsumexp L_r of its own logits and share s_r = exp(L_r - L) of the probability, with
    L = logsumexp_r L_r. The rank that holds the target also has its exact -logp = L_r - z within the shard, so that
    -logp = log(exp(L_r - z) + sum of the others' exp(L_s - z)) keeps its digits where it is near 0; and
    entropy = sum_r s_r (H_r - log s_r).

    Args:
        rows: how many rows of the vocabulary this rank holds; the ranks' rows follow each other in the group's order.
        target: [...] int64, over the whole vocabulary; negative: ignored.

    Raises:
        ValueError: a target outside the vocabulary.
    """

    def __init__(self, rows: int, target: Tensor, group: dist.ProcessGroup) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        sizes: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(sizes, rows, group=group)
        ends = torch.tensor(sizes, device=target.device).cumsum(0)
        if target.device.type == "cpu" and bool((target >= ends[-1]).any()):
            raise ValueError(f"target {int(target.max())} is outside the vocabulary of {int(ends[-1])}")
        self.used = target >= 0
        owner = torch.bucketize(target, ends, right=True)  # the rank whose rows hold the target
        ranks = torch.arange(len(sizes), device=target.device).view(-1, *[1] * target.dim())
        self.owned = (owner == ranks) & self.used  # [ranks, ...]
        # Another rank's target is asked for as row 0 here: its log-probability holds this shard's logsumexp too.
        local = torch.where(self.owned[self.rank], target - (ends[self.rank] - rows), 0)
        self.target = torch.where(self.used, local, target)

    def replicated(self, hidden: Tensor) -> Tensor:
        """hidden, whose gradient is the sum over the ranks."""
        replicated: Tensor = _Replicated.apply(hidden, self.group)  # type: ignore[no-untyped-call]
        return replicated

    def combine(self, logit: Tensor, logp: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """logp and entropy over the whole vocabulary, the same on every rank.

        Args:
            logit, logp, entropy: of target's shape, f32, for `self.target` within this shard.
        """
        mine = self.owned[self.rank]
        local = [
            torch.where(mine, -logp, logit - logp),
            torch.where(mine, logit, 0),
            *([] if entropy is None else [entropy]),
        ]
        parts = _FromAllRanks.apply(torch.stack(local), self.group)  # type: ignore[no-untyped-call]
        spread, logits, *entropies = parts.unbind(1)  # each [ranks, ...]
        own = torch.where(self.owned, spread, 0).sum(0)  # L_r - z on the owner
        target_logit = logits.sum(0)
        others = torch.where(self.owned, -torch.inf, spread).logsumexp(0)
        nll = torch.logaddexp(own, others - target_logit)
        total = None
        if entropy is not None:
            log_share = torch.where(self.owned, spread - nll, spread - target_logit - nll)
            total = torch.where(self.used, (log_share.exp() * (entropies[0] - log_share)).sum(0), 0)
        return torch.where(self.used, -nll, 0), total
