"""Adaptive entropy control: the weight of the entropy bonus follows the entropy (Skywork-OR1, arXiv:2505.22312)."""

from __future__ import annotations

from dataclasses import dataclass

from longgrpo.config.loss import LossConfig


@dataclass
class EntropyControl:
    """Its state between two updates; saved with a checkpoint."""

    coefficient: float
    entropy: float | None = None
    """Of the last update, a mean over its tokens in nats; None: there was none."""

    def applied(self, loss: LossConfig) -> float:
        """The weight in the next update: 0 while the entropy is above the target, and before it is known."""
        assert loss.entropy_target is not None
        return self.coefficient if self.entropy is not None and self.entropy <= loss.entropy_target else 0.0

    def observe(self, entropy: float, loss: LossConfig) -> None:
        """The entropy of an update: the weight moves towards more or less of it."""
        assert loss.entropy_target is not None
        step = loss.entropy_coef_delta if entropy <= loss.entropy_target else -loss.entropy_coef_delta
        self.coefficient = min(max(self.coefficient + step, loss.entropy_coef_min), loss.entropy_coef_max)
        self.entropy = entropy
