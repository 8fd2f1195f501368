"""longgrpo: long-context GRPO on few GPUs."""

from longgrpo.loss import (
    GRPOLoss,
    GRPOLossConfig,
    LinearGRPOLoss,
    LogProb,
    LossTokens,
    OffPolicyCorrection,
    Tuning,
    autotune,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    loss_normalizer,
)
from longgrpo.offload import OffloadEngine

__version__ = "0.1.0"

__all__ = [
    "GRPOLoss",
    "GRPOLossConfig",
    "LinearGRPOLoss",
    "LogProb",
    "LossTokens",
    "OffPolicyCorrection",
    "OffloadEngine",
    "Tuning",
    "autotune",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprob",
    "loss_normalizer",
]
