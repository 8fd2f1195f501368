"""What a loss of the GRPO family is, as one value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from longgrpo.loss.types import CORRECTIONS, EXACT_KL, KL_ESTIMATORS, LOSS_TYPES, SEQUENCE_CORRECTIONS, loss_type

IMPORTANCE_LEVELS = ("token", "sequence")


def _choose(name: str, value: str, choices: Sequence[str]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}"
    raise ValueError(f"unknown {name} {value!r}: {hint}")


@dataclass(frozen=True)
class GRPOLossConfig:
    """A loss of the GRPO family. The formulas and their sources are in csrc/math/token_loss.h, the table
    of the types in csrc/math/loss_types.h.

    Attributes:
        loss_type: grpo (arXiv:2402.03300), bnpo, dr_grpo (2503.20783), dapo (2503.14476), cispo (2506.13585),
            sapo (2511.20347), vespo, luspo, gmpo (2507.20673).
        importance_level: "token", or "sequence" for GSPO's ratio (2507.18071).
        kl: estimator of the divergence from the reference policy; read if `beta` is not 0.
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

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read only by pydantic, no field

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
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)}")
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")

    def _check_combinations(self) -> None:
        if self.kl_correction and self.kl != "k3":
            raise ValueError(f"kl_correction corrects kl='k3', not kl={self.kl!r}")
        row = loss_type(self.loss_type)
        if self.delta is not None and not row.ppo_clip:
            raise ValueError(f"delta is a bound of PPO's clip; loss_type={self.loss_type!r} has no such clip")
        if not self.detach and row.detached:
            raise ValueError(f"detach=False changes a ratio that is differentiated; {self.loss_type}'s is not")
        if row.whole_sequence and self.importance_level == "sequence" and not self.kl_correction:
            raise ValueError(f"{self.loss_type} has a sequence-level weight of its own: leave importance_level='token'")

    @property
    def exact_kl(self) -> bool:
        """Whether the KL term is a sum over the vocabulary, which needs the reference's hidden states."""
        return self.beta != 0 and self.kl in EXACT_KL

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's gradient depends on the rest of its sequence."""
        return self.importance_level == "sequence" or loss_type(self.loss_type).whole_sequence


@dataclass(frozen=True)
class OffPolicyCorrection:
    """What is done about tokens that the loss's policy would not have sampled: factors of the policy term, detached.

    The engine that samples and the trainer that scores differ in kernels, precision and weights. With the ratio
    pi_old / pi_sampling = exp(old_logp - sampling_logp), its exponent clamped to +-20, truncated importance sampling
    (TIS) multiplies by min(ratio, cap), and masked importance sampling (MIS) by the ratio, or 0 outside of
    [1 / cap, cap]. The names are those of TRL's vllm_importance_sampling_mode.

    Attributes:
        importance: "none"; "token_truncate" or "token_mask" by each token's ratio; "sequence_truncate" or
            "sequence_mask" by the exponential of the mean log ratio over the sequence's tokens of the loss (a product
            over a long one would leave any bound).
        cap: of the ratio, > 1.
        threshold: nats. A sequence with a negative advantage has no policy gradient once the mean of
            old_logp - logp over its tokens of the loss exceeds it (DeepSeek-V3.2, arXiv:2512.02556); with an
            advantage a token, its tokens of negative advantage. None: no threshold.
    """

    importance: str = "none"
    cap: float = 2.0
    threshold: float | None = None

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read only by pydantic, no field

    def __post_init__(self) -> None:
        _choose("importance", self.importance, CORRECTIONS)
        if not (math.isfinite(self.cap) and self.cap > 1):
            raise ValueError(f"cap bounds the ratio of two policies and must be a finite number > 1, got {self.cap}")
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold must be a finite number of nats >= 0, or None for none, got {self.threshold}")

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's factor depends on the rest of its sequence."""
        return self.importance in SEQUENCE_CORRECTIONS or self.threshold is not None


def packed(config: GRPOLossConfig, correction: OffPolicyCorrection) -> tuple[list[int], list[float]]:
    """The ops' form: `options` and `constants`, in the order of LossConfig in csrc/math/loss_config.h."""
    options = [
        LOSS_TYPES.index(config.loss_type),
        KL_ESTIMATORS.index(config.kl),
        int(config.importance_level == "sequence"),
        int(config.kl_correction),
        int(config.detach),
        CORRECTIONS.index(correction.importance),
    ]
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    constants = [
        config.beta, config.epsilon, high, math.inf if config.delta is None else config.delta, config.entropy_coef,
        config.sapo_temperature_pos, config.sapo_temperature_neg,
        config.vespo_k_pos, config.vespo_lambda_pos, config.vespo_k_neg, config.vespo_lambda_neg,
        correction.cap, math.inf if correction.threshold is None else correction.threshold,
    ]  # fmt: skip
    return options, [float(value) for value in constants]


def loss_normalizer(
    config: GRPOLossConfig,
    sequences: float | Tensor,
    tokens: float | Tensor,
    max_completion_length: int | None = None,
) -> float | Tensor:
    """What the loss of `config` divides by, counted over whatever one optimizer step takes together.

    Args:
        sequences: their number.
        tokens: how many of their tokens are in the loss.
        max_completion_length: the longest allowed completion in tokens, if the config does not say it.

    Returns: the `normalizer` of grpo_loss, at least 1.

    Raises:
        ValueError: a loss type that divides by a length, and no length.
    """
    divides_by = loss_type(config.loss_type).divides_by
    if divides_by == "tokens":
        return _at_least_one(tokens)
    if divides_by == "sequences":
        return _at_least_one(sequences)
    length = config.max_completion_length if config.max_completion_length is not None else max_completion_length
    if length is None:
        raise ValueError(f"loss_type={config.loss_type!r} divides by max_completion_length: set it in the config")
    return _at_least_one(sequences) * length


def _at_least_one(count: float | Tensor) -> float | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
