"""GRPO (arXiv:2402.03300) as a loss of one's own: `--loss.function examples/own_loss.py:grpo --loss.loss_type grpo`."""

import torch

from longgrpo.loss import LossInputs

EPSILON = 0.2


def grpo(t: LossInputs):
    """PPO's clipped surrogate, a mean over each sequence's tokens and over the sequences of the update."""
    ratio = (t.logp - t.old_logp).exp()  # [N]
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    per_token = -torch.minimum(ratio * t.advantages, clipped * t.advantages)
    lengths = t.cu_seqlens.diff()  # [S]
    weight = (1.0 / lengths).repeat_interleave(lengths, output_size=len(ratio))  # [N]
    return (weight * per_token).sum() / t.normalizer, {"clipped": (ratio != clipped).float().mean()}
