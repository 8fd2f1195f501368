"""A completion with what is known of it on the host, and a step's completions as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from longgrpo.rollout.protocol import Completion
from longgrpo.tasks.data import Problem


@dataclass
class Sample:
    """One completion."""

    group: int
    """The prompt's number within the step: samples of one group have one prompt."""
    prompt_ids: list[int]
    completion: Completion
    text: str
    extra: dict[str, Any] = field(default_factory=dict)
    """Columns that reward functions log."""

    def __len__(self) -> int:
        """Tokens of the completion."""
        return len(self.completion.token_ids)


@dataclass
class Rollout:
    """The completions of P prompts, G of each, group after group; T sampled tokens in all."""

    problems: list[Problem]  # P
    samples: list[Sample]  # P G
    rewards: Tensor  # [F, P, G] float64: of F reward functions; NaN: it does not apply
    advantages: Tensor  # [P, G] float32
    token_ids: Tensor  # [T] int64
    sampling_logp: Tensor  # [T] float32: the engine's
    bounds: list[int]  # P G + 1: sample i has the tokens [bounds[i], bounds[i+1])

    @classmethod
    def of(cls, problems: Sequence[Problem], samples: Sequence[Sample], rewards: Tensor) -> Rollout:
        """Advantages are 0 until they are set."""
        completions = [sample.completion for sample in samples]
        return cls(
            list(problems),
            list(samples),
            rewards,
            torch.zeros(rewards.shape[1:]),
            torch.tensor([token for completion in completions for token in completion.token_ids], dtype=torch.int64),
            torch.tensor([logp for completion in completions for logp in completion.logprobs], dtype=torch.float32),
            [0, *accumulate(map(len, samples))],
        )

    def tokens_of(self, indices: Iterable[int]) -> Tensor:
        """[M] int64 into the T tokens: those of these samples."""
        spans = [torch.arange(self.bounds[i], self.bounds[i + 1]) for i in indices]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)
