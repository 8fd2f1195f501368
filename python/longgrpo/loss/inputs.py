"""The per-token tensors that a loss of one's own is a function of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longgrpo.loss.devices import bring_tokens, require
from longgrpo.loss.flatten import per_token
from longgrpo.loss.tokens import LossTokens


@dataclass(frozen=True)
class LossInputs:
    """N tokens of S sequences, laid end to end; all float32 unless said otherwise.

    The head turns the gradient of `logp` into that of the model, exactly as for a built-in loss. Dividing a sum over
    the tokens by `normalizer` gives a loss that does not depend on how an update is split into micro-batches.
    """

    logp: Tensor  # [N], differentiable: log-probabilities of the sampled tokens under the policy, in nats
    advantages: Tensor  # [N]
    mask: Tensor  # [N] bool: the tokens of the loss
    cu_seqlens: Tensor  # [S + 1] int32: sequence s is [cu_seqlens[s], cu_seqlens[s + 1])
    old_logp: Tensor  # [N]: before the rollout's first update; `logp` detached if there has been none
    ref_logp: Tensor | None  # [N]: of the reference policy, if loss.beta is not 0
    sampling_logp: Tensor | None  # [N]: of the engine that sampled
    entropy: Tensor  # [N], without gradient: of the policy's distribution, in nats
    importance: Tensor | None  # [N]: 0 for tokens without a policy gradient (train.top_entropy_quantile)
    normalizer: float
    """What the whole update divides by, over all its micro-batches: sequences, tokens or sequences times
    max_completion_length, by loss.loss_type."""

    @classmethod
    def of(cls, logp: Tensor, entropy: Tensor, tokens: LossTokens, normalizer: float) -> LossInputs:
        """logp and entropy [N]; tokens: flat ones, with their bounds, on logp's device or the CPU."""
        tokens = bring_tokens("logp", logp.device, tokens)
        require("logp", logp.device, entropy=entropy)
        assert tokens.cu_seqlens is not None
        advantages = tokens.advantages
        if advantages.shape != logp.shape:
            advantages = per_token(advantages, tokens.cu_seqlens, logp.numel())
        return cls(
            logp,
            advantages,
            torch.ones_like(logp, dtype=torch.bool) if tokens.mask is None else tokens.mask,
            tokens.cu_seqlens,
            logp.detach() if tokens.old_logp is None else tokens.old_logp,
            tokens.ref_logp,
            tokens.sampling_logp,
            entropy.detach(),
            tokens.importance,
            normalizer,
        )
