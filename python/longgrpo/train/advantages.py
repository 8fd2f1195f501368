"""From rewards to advantages. Rewards are NaN if no reward function applied."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4  # added to a standard deviation, as in TRL
Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """values [F, P, G], weights [F] -> [P, G]: the sum over the functions that apply; NaN if none does."""
    return (values * weights[:, None, None]).nansum(0).masked_fill(values.isnan().all(0), torch.nan)


def advantages(values: Tensor, weights: Tensor, scale: Scale, aggregation: Aggregation) -> Tensor:
    """values f64 [F, P, G] of F functions, P prompts and G completions, weights [F] -> f32 [P, G].

    Exactly 0 in a group without spread, so that such groups can be left out of the backward, and if no function
    applied.
    """
    if aggregation == "sum_then_normalize":
        return group_advantages(weighted_sum(values, weights), scale)
    normalized = torch.stack([group_advantages(value, "group", torch.nan) for value in values])
    total = weighted_sum(normalized.to(values.dtype), weights)  # GDPO: again over the whole step
    centered = (total - total.nanmean()) / (_deviation(total.flatten()) + EPSILON)
    return torch.where(groups_with_spread(values, weights, aggregation)[:, None], centered, 0.0).nan_to_num(0.0).float()


def group_advantages(rewards: Tensor, scale: Scale = "group", unknown: float = 0.0) -> Tensor:
    """rewards [P, G], one row per prompt -> advantages f32 [P, G], `unknown` if there is no reward.

    Each reward less its group's mean, over the standard deviation of the group or of all (n - 1, as TRL takes it).
    """
    centered = rewards - rewards.nanmean(1, keepdim=True)
    if scale == "group":
        centered = centered / (_deviation(rewards) + EPSILON)
    elif scale == "batch":
        centered = centered / (_deviation(rewards.flatten()) + EPSILON)
    centered = torch.where(has_spread(rewards)[:, None], centered, 0.0)
    return centered.masked_fill(rewards.isnan(), unknown).float()


def turn_advantages(returns: list[list[list[float]]], scale: Scale) -> list[list[Tensor]]:
    """returns: of each group, member and turn what was earned from that turn on; a member without a known reward has no
    turns -> f32 advantages in the same form.

    A turn is compared with the same turn of the other members that have one; one that only a single member has is 0.
    """
    everything = torch.tensor([value for group in returns for member in group for value in member], dtype=torch.float64)
    divisor = _deviation(everything) + EPSILON if scale == "batch" and len(everything) else None
    found = []
    for group in returns:
        most = max(map(len, group), default=0)
        rows = [member + [torch.nan] * (most - len(member)) for member in group]
        table = torch.tensor(rows, dtype=torch.float64).view(len(group), most).T  # [turns, members]
        own = group_advantages(table, "group" if scale == "group" else "none")
        own = own / divisor if divisor is not None else own
        found.append([own[: len(member), i].float() for i, member in enumerate(group)])
    return found


def groups_with_spread(values: Tensor, weights: Tensor, aggregation: Aggregation) -> Tensor:
    """[P] bool: whether a group's rewards differ in what the advantages are made of."""
    if aggregation == "sum_then_normalize":
        return has_spread(weighted_sum(values, weights))
    return (has_spread(values) & (weights != 0)[:, None]).any(0)


def has_spread(rewards: Tensor) -> Tensor:
    """[..., G] -> [...] bool: whether the known rewards of a group differ at all. The mean of equal floats need not
    equal them."""
    low = rewards.nan_to_num(nan=torch.inf).amin(-1)
    high = rewards.nan_to_num(nan=-torch.inf).amax(-1)
    return high > low


def _deviation(rewards: Tensor) -> Tensor:
    """The standard deviation (n - 1) of the known rewards along the last axis, which is kept; 0 of a single one."""
    count = (~rewards.isnan()).sum(-1, keepdim=True)
    squares = (rewards - rewards.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()
