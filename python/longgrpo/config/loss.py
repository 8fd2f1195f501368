"""The loss of a run: the library's, or one of the user's own."""

from __future__ import annotations

from dataclasses import dataclass

from longgrpo.config.check import require
from longgrpo.loss.config import GRPOLossConfig


@dataclass(frozen=True)
class LossConfig(GRPOLossConfig):
    """The loss. The formulas and their sources are in csrc/math/token_loss.h."""

    function: str | None = None
    """A loss of your own (path/to/file.py:function, package.module:function) instead of loss_type's. It takes a
    longgrpo.loss.LossInputs and returns a scalar and a dict of metrics. loss_type then only sets what the normalizer
    counts, beta only whether there is a reference policy, and the function itself applies rollout.importance
    (docs/own-loss.md)."""
    entropy_target: float | None = None
    """Adaptive entropy control (Skywork-OR1, arXiv:2505.22312, section 4): the bonus applies only while the entropy of
    the last update, a mean over its tokens in nats, is at or below this value. Each update moves its weight, which
    begins as entropy_coef, by entropy_coef_delta: up at or below the target, else down. Take a value near the metric
    `entropy` of the first steps."""
    entropy_coef_delta: float = 0.005
    """How far an update moves the weight."""
    entropy_coef_min: float = 0.0
    """Its lower bound."""
    entropy_coef_max: float = 1.0
    """Its upper bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.entropy_target is None:
            return
        require(self.function is None, "entropy_target steers the bonus of loss_type: a function has its own")
        require(self.entropy_target > 0, f"entropy_target = {self.entropy_target}: must be above 0 nats")
        require(self.entropy_coef_delta > 0, f"entropy_coef_delta = {self.entropy_coef_delta}: must be above 0")
        low, start, high = self.entropy_coef_min, self.entropy_coef, self.entropy_coef_max
        require(
            0 <= low <= start <= high,
            f"entropy_coef_min = {low}, entropy_coef = {start}, entropy_coef_max = {high}: must rise from 0",
        )

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the entropy enters the loss, in some update at least."""
        return self.entropy_coef != 0 or self.entropy_target is not None
