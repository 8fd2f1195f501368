"""The loss: hidden states in, log-probabilities or a loss out, with exact gradients and bounded memory."""

from longgrpo.loss.config import GRPOLossConfig
from longgrpo.loss.grpo import GRPOLoss, LinearGRPOLoss, grpo_loss, linear_grpo_loss
from longgrpo.loss.linear import LogProb, linear_logprob

__all__ = [
    "GRPOLoss",
    "GRPOLossConfig",
    "LinearGRPOLoss",
    "LogProb",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprob",
]
