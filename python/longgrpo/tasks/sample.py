"""What a rollout, the reward functions and the loss each add to a completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from longgrpo.rollout.protocol import Completion


@dataclass
class Sample:
    """A completion on its way through a step."""

    group: int
    """The prompt's number within the step: samples of one group have one prompt."""
    prompt_ids: list[int]
    completion: Completion
    text: str
    advantage: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """Columns that reward functions log."""
    old_logp: Tensor | None = None  # [T] f32: of the policy that sampled, where it is trained on more than once
    ref_logp: Tensor | None = None  # [T] f32
    policy_weight: Tensor | None = None  # [T] f32: 0 where a token has no policy gradient

    def __len__(self) -> int:
        """Tokens of the completion."""
        return len(self.completion.token_ids)
