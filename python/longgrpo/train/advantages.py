"""From rewards to advantages."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4


def group_advantages(rewards: Tensor, scale: Literal["group", "none"] = "group") -> Tensor:
    """rewards [P, G] (NaN: no reward function applied), a row the completions of one prompt -> advantages, f32 [P, G].

    Each reward less its group's mean, and for "group" over the group's standard deviation (n - 1, as TRL takes it) plus
    1e-4. Exactly 0 in a group without spread, so that such groups can be left out of the backward, and where the reward
    is NaN.
    """
    known = ~rewards.isnan()
    count = known.sum(1, keepdim=True)
    mean = rewards.nanmean(1, keepdim=True)
    centred = torch.where(known, rewards - mean, 0.0)
    if scale == "group":
        deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (deviation + EPSILON)
    return torch.where(has_spread(rewards)[:, None], centred, 0.0).float()


def has_spread(rewards: Tensor) -> Tensor:
    """[P] bool: whether the known rewards of a group differ at all. The mean of equal floats need not equal them."""
    low = rewards.nan_to_num(nan=torch.inf).amin(1)
    high = rewards.nan_to_num(nan=-torch.inf).amax(1)
    return high > low
