"""What a finding is: a question about a run's metrics, its bounds, and the words for the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from longgrpo.watch.history import KEPT, History

EARNED = 0.9
"""From this share of the reward on, what is lost because the replies are right is no finding: a tenth of a reward is as
much as a wrong label in ten, or one prompt in ten that is too hard."""

Seen = Mapping[str, str]
"""What a finding has seen, as a sentence, by the reward function that it is about; "" if it is about the run."""


@dataclass(frozen=True)
class Finding:
    """The fields are the bounds, which a config can set. `see` is a function of the history and of nothing else."""

    METRIC: ClassVar[str]
    """The metric that shows it best."""
    WHY: ClassVar[str]
    """Why it is bad."""
    CURE: ClassVar[str]

    def see(self, history: History) -> Seen:
        """Empty if there is nothing to report."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{bound.name} = {value}: must be a number above 0 (null instead of the bounds: off)")
            if bound.name == "steps" and value > KEPT:
                raise ValueError(f"steps = {value}: the watch keeps the last {KEPT}; take fewer")


def lost(value: float, history: History, steps: int) -> float:
    """`value`, a share of something that fades as replies become right, as a share of the reward still to be earned;
    infinite if almost all of it is earned."""
    unearned = history.unearned(steps)
    return value / unearned if unearned > 1 - EARNED else math.inf
