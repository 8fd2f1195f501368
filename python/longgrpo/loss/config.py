"""What a loss of the GRPO family is, as one value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

# The order of the enums in csrc/math/token_loss.h.
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo", "gmpo")
KL_ESTIMATORS = (
    "k1", "abs", "k2", "k3", "k3_plus", "forward", "forward_unbiased", "article_reverse", "article_forward",
    "exact_reverse", "exact_forward",
)  # fmt: skip
IMPORTANCE_LEVELS = ("token", "sequence")


def _choose(name: str, value: str, choices: Sequence[str]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}"
    raise ValueError(f"unknown {name} {value!r}: {hint}")


@dataclass(frozen=True)
class GRPOLossConfig:
    """A loss of the GRPO family. The formulas and their sources are in csrc/math/token_loss.h.

    Attributes:
        loss_type: grpo (arXiv:2402.03300), bnpo, dr_grpo (2503.20783), dapo (2503.14476), cispo (2506.13585),
            sapo (2511.20347), vespo, luspo, gmpo (2507.20673).
        importance_level: "token", or "sequence" for GSPO's ratio (2507.18071).
        kl: estimator of the divergence from the reference policy; read where `beta` is not 0.
        kl_correction: weigh the k3 estimator by the importance ratio, which makes its gradient exact.
        beta: weight of the KL term.
        epsilon: lower clip range; for gmpo the lower bound of the log ratio.
        epsilon_high: upper clip range, `epsilon` if None; for cispo the cap of the ratio itself (the paper's 5, say:
            with 0.28 every ratio above 0.28 is cut); for gmpo the upper bound of the log ratio.
        delta: upper bound of the ratio for negative advantages (two-sided clipping); None for no bound.
        entropy_coef: weight of the entropy bonus, averaged as the loss is.
        max_completion_length: the longest allowed completion in tokens; dr_grpo divides by it.
        detach: False leaves the on-policy ratio exp(q - q) without the detach: its policy gradient is zero.
        sapo_temperature_pos, sapo_temperature_neg: SAPO's gate for positive and negative advantages.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: VESPO's weight exp(l + k log w - l w).
    """

    loss_type: str = "dapo"
    importance_level: str = "token"
    kl: str = "k3"
    kl_correction: bool = False
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    entropy_coef: float = 0.0
    max_completion_length: int | None = None
    detach: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic alone, no field

    def __post_init__(self) -> None:
        _choose("loss_type", self.loss_type, LOSS_TYPES)
        _choose("kl", self.kl, KL_ESTIMATORS)
        _choose("importance_level", self.importance_level, IMPORTANCE_LEVELS)
        self._check_numbers()
        self._check_combinations()

    def _check_numbers(self) -> None:
        for name in ("beta", "epsilon", "entropy_coef"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        if self.epsilon_high is not None and not self.epsilon_high >= 0:
            raise ValueError(f"epsilon_high must be >= 0 or None, got {self.epsilon_high}")
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta bounds the ratio from above and must be > 0 or None, got {self.delta}")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be >= 1 or None, got {self.max_completion_length}")
        if not (self.sapo_temperature_pos > 0 and self.sapo_temperature_neg > 0):
            raise ValueError("sapo_temperature_pos and sapo_temperature_neg must be > 0")

    def _check_combinations(self) -> None:
        if self.kl_correction and self.kl != "k3":
            raise ValueError(f"kl_correction corrects kl='k3', not kl={self.kl!r}")
        if self.delta is not None and self.loss_type in ("cispo", "sapo", "vespo", "gmpo"):
            raise ValueError(f"delta is a bound of PPO's clip; loss_type={self.loss_type!r} has no such clip")
        if not self.detach and self.loss_type in ("cispo", "vespo"):
            raise ValueError(f"detach=False changes a ratio that is differentiated; {self.loss_type}'s is not")
        if self.loss_type in ("vespo", "gmpo") and self.importance_level == "sequence" and not self.kl_correction:
            raise ValueError(f"{self.loss_type} has a sequence-level weight of its own: leave importance_level='token'")

    @property
    def exact_kl(self) -> bool:
        """Whether the KL term is a sum over the vocabulary, which needs the reference's hidden states."""
        return self.beta != 0 and self.kl.startswith("exact")

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's gradient depends on the rest of its sequence."""
        return self.importance_level == "sequence" or self.loss_type in ("vespo", "gmpo")

    def packed(self) -> tuple[list[int], list[float]]:
        """The ops' form of a config: `options` and `constants`, in the order of LossConfig in token_loss.h."""
        options = [
            LOSS_TYPES.index(self.loss_type),
            KL_ESTIMATORS.index(self.kl),
            int(self.importance_level == "sequence"),
            int(self.kl_correction),
            int(self.detach),
        ]
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        constants = [
            self.beta, self.epsilon, high, math.inf if self.delta is None else self.delta, self.entropy_coef,
            self.sapo_temperature_pos, self.sapo_temperature_neg,
            self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg,
        ]  # fmt: skip
        return options, [float(value) for value in constants]
