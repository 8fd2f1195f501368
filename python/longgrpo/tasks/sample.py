"""A completion with what is known of it on the host, and a step's completions as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from longgrpo.rollout.protocol import Completion
from longgrpo.tasks.data import Problem, Prompt, Reply, as_reply
from longgrpo.tasks.episodes import Episode


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
    turn_rewards: dict[str, list[float]] = field(default_factory=dict)
    """By function, of those that return one value a turn."""
    episode: Episode | None = None
    """Of a completion with tools or an environment."""

    def __len__(self) -> int:
        """Sampled tokens of the completion."""
        return len(self.completion.sampled_at)

    @property
    def failed(self) -> bool:
        """Whether it is left out of its group, whatever it earns."""
        return bool(self.episode and self.episode.failed)

    def shed(self) -> Sample:
        """Without what only this process can hold: the tools and the environment of an episode that is over."""
        if self.episode is None:
            return self
        return replace(self, episode=replace(self.episode, tools={}, environment=None, generators=None))

    def prompt(self, problem: Problem, sent: bool = False) -> Prompt:
        """As rewards get it (Problem.form). An episode is always a conversation."""
        return self.episode.prompt if self.episode else problem.form(sent)

    def reply(self, problem: Problem, sent: bool = False) -> Reply:
        """In the form of the prompt."""
        return self.episode.messages if self.episode else as_reply(problem.form(sent), self.text)


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
    turn_advantages: list[Tensor] | None = None  # P G, of each sample float32, one a turn; None: `advantages` are used

    @classmethod
    def of(cls, problems: Sequence[Problem], samples: Sequence[Sample], rewards: Tensor) -> Rollout:
        """Advantages are 0 until they are set."""
        completions = [sample.completion for sample in samples]
        return cls(
            list(problems),
            list(samples),
            rewards,
            torch.zeros(rewards.shape[1:]),
            torch.tensor([token for completion in completions for token in completion.sampled_ids], dtype=torch.int64),
            torch.tensor([logp for completion in completions for logp in completion.logprobs], dtype=torch.float32),
            [0, *accumulate(map(len, samples))],
        )

    def tokens_of(self, indices: Iterable[int]) -> Tensor:
        """[M] int64 into the T tokens: those of these samples."""
        spans = [torch.arange(self.bounds[i], self.bounds[i + 1]) for i in indices]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)
