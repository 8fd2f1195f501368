"""The loss: hidden states in, log-probabilities or a loss out, with exact gradients and bounded memory."""

from longgrpo.loss.config import GRPOLossConfig, OffPolicyCorrection, loss_normalizer
from longgrpo.loss.grpo import GRPOLoss, LinearGRPOLoss, grpo_loss, linear_grpo_loss
from longgrpo.loss.inputs import LossInputs
from longgrpo.loss.linear import LogProb, linear_logprob
from longgrpo.loss.tokens import LossTokens
from longgrpo.loss.tuner import Tuning, autotune
from longgrpo.loss.types import LossType, loss_type

__all__ = [
    "GRPOLoss",
    "GRPOLossConfig",
    "LinearGRPOLoss",
    "LogProb",
    "LossInputs",
    "LossTokens",
    "LossType",
    "OffPolicyCorrection",
    "Tuning",
    "autotune",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprob",
    "loss_normalizer",
    "loss_type",
]
