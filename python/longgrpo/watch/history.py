"""What the findings look at: the metrics of a run's first and last steps, and the range of what it has seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

START = 5  # steps whose mean is the start of a run
KEPT = 100  # last steps that are kept; a finding looks at fewer
EVALUATED = "eval/accuracy"


@dataclass(frozen=True)
class Facts:
    """What the findings know of a run besides its metrics."""

    max_completion_length: int
    max_grad_norm: float
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of the reward functions, by their names in the metrics."""
    tops: Mapping[str, float] = field(default_factory=dict)
    """The highest value that a reward function can give, if that is known."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation during training."""

    accuracy: float
    reward: float
    """The mean reward of the steps up to it."""


class History:
    """The metrics of the steps so far, as far as the findings need them. The same rows give the same history."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.steps = 0
        self.evaluations: list[Evaluated] = []
        self._first: list[Mapping[str, Any]] = []
        self._last: deque[Mapping[str, Any]] = deque(maxlen=KEPT)
        self._lowest: dict[str, float] = {}
        self._highest: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """The metrics of the next step. None: not finite."""
        self.steps += 1
        if self.steps <= START:
            self._first.append(metrics)
        self._last.append(metrics)
        for name, value in metrics.items():
            if value is not None and name.endswith("/min"):
                self._lowest[name] = min(value, self._lowest.get(name, value))
            if value is not None and name.endswith("/max"):
                self._highest[name] = max(value, self._highest.get(name, value))
        reward = self.mean("reward/mean", min(self.steps, START))
        if metrics.get(EVALUATED) is not None and reward is not None:
            self.evaluations.append(Evaluated(metrics[EVALUATED], reward))

    def last(self, name: str, steps: int) -> list[float]:
        """The metric in the last `steps` steps, oldest first, without those that lack it; empty if there have not been
        as many steps, or if more than half of them lack it."""
        if self.steps < steps:
            return []
        rows = list(self._last)[-steps:]
        known = [row[name] for row in rows if row.get(name) is not None]
        return known if 2 * len(known) >= steps else []

    def mean(self, name: str, steps: int) -> float | None:
        """The mean of `last`; None if that is empty."""
        known = self.last(name, steps)
        return fmean(known) if known else None

    def start(self, name: str) -> float | None:
        """The mean over the first steps of the run; None before they are over, and if none of them has it."""
        known = [row[name] for row in self._first if row.get(name) is not None]
        return fmean(known) if known and self.steps >= START else None

    def range(self, name: str) -> tuple[float, float]:
        """The lowest and the highest value of a completion in the run so far, of a reward ("reward", "reward/NAME");
        0 and 0 if there was none."""
        return self._lowest.get(f"{name}/min", 0.0), self._highest.get(f"{name}/max", 0.0)

    def unearned(self, steps: int) -> float:
        """The share of the reward that the last steps did not earn: 0 if each completion earned the highest total that
        the run has seen, 1 if each earned the lowest, and if all totals have been equal."""
        low, high = self.range("reward")
        mean = self.mean("reward/mean", steps)
        return 1.0 if mean is None or high <= low else (high - mean) / (high - low)
