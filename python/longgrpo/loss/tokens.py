"""What a loss knows of each token, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossTokens:
    """The keyword arguments of grpo_loss and linear_grpo_loss that have one entry a token or a sequence: both are
    called as `grpo_loss(logp, **vars(tokens), config=config)`.

    Shapes: N tokens of S sequences with `cu_seqlens`, or padded [B, T] (then S = B); float32 if no dtype is named.

    Attributes:
        advantages: [S], or one a token.
        mask: one a token, bool; None: every token counts.
        cu_seqlens: [S + 1] int32, rising from 0 to N; None for padded tokens.
        old_logp: one a token, nats: under the policy that the ratio is taken to. None: on policy.
        ref_logp: one a token, nats: under the reference policy.
        sampling_logp: one a token, nats: as the engine that sampled said them.
        importance: one a token or a sequence; multiplies the policy term.
    """

    advantages: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    sampling_logp: Tensor | None = None
    importance: Tensor | None = None
