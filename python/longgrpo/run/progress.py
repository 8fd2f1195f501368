"""How far a run is: what a checkpoint holds besides weights, data and random generators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass
class Progress:
    """The state of a run besides its weights; saved with them."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Run time, without the time between a stop and a resume."""
    peak_rss_bytes: int = 0
    logprob_diff_max: float = 0.0
    groups_with_spread_before: float | None = None
    untrained_seen: bool = False
    """Whether what was measured before step 1 is in the metrics."""
    metric: float | None = None
    """train.best_metric of the last step."""
    best_evaluation: float | None = None
    """train.best_metric of the best evaluation during training."""
    evaluations_since_best: int = 0
    skipped_updates: int = 0
    """Updates skipped in a row, up to now."""

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Progress:
        """Of a checkpoint; what another version kept besides is left out."""
        return cls(**{field.name: saved[field.name] for field in fields(cls) if field.name in saved})

    def count_evaluation(self) -> bool:
        """Counts the evaluation whose value is `metric`; returns whether it is better than all before it."""
        better = self.metric is not None and (self.best_evaluation is None or self.metric > self.best_evaluation)
        self.best_evaluation = self.metric if better else self.best_evaluation
        self.evaluations_since_best = 0 if better else self.evaluations_since_best + 1
        return better

    def out_of_patience(self, patience: int) -> bool:
        """Whether `patience` evaluations in a row were no better; never with a patience of 0."""
        return 0 < patience <= self.evaluations_since_best
