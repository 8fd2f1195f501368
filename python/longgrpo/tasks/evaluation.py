"""Greedy accuracy on the held-out problems, and what two evaluations of the same problems say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from longgrpo.config.sampling import Sampling
from longgrpo.errors import DataError
from longgrpo.rollout.protocol import RolloutEngine
from longgrpo.tasks.data import Problem, as_reply, check_length, columns_of, decode, encode
from longgrpo.tasks.rewards import Reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """One entry a problem, in the order of the problems."""

    questions: list[str]
    replies: list[str]
    scores: list[float]

    @property
    def solved(self) -> list[bool]:
        return [score >= 1.0 for score in self.scores]

    @property
    def accuracy(self) -> float:
        return sum(self.solved) / len(self.solved)


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    reward: Reward,
    max_tokens: int,
    prefill: str | None = None,
    template: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Greedy replies. With `prefill`, each begins with that template; the reward sees what follows. `template`:
    arguments of the chat template.

    Raises DataError for a template that names what a problem does not have.
    """
    prefixes = [_filled(prefill, problem) if prefill else "" for problem in problems]
    prompts = [
        encode(tokenizer, problem.prompt, template, prefix) for problem, prefix in zip(problems, prefixes, strict=True)
    ]
    for ids, problem in zip(prompts, problems, strict=True):
        check_length(ids, problem, engine.max_length())
    completions = engine.generate(prompts, Sampling(max_tokens=max_tokens, temperature=0.0), [0] * len(prompts))
    replies = decode(tokenizer, completions)
    from transformers import TrainerState

    scores = reward(
        [problem.prompt for problem in problems],
        [as_reply(problem.prompt, text) for problem, text in zip(problems, replies, strict=True)],
        [completion.token_ids for completion in completions],
        columns_of(problems),
        TrainerState(),
    )
    return Evaluation([p.question for p in problems], replies, scores.values.nan_to_num(nan=0.0).tolist())


def _filled(template: str, problem: Problem) -> str:
    try:
        return template.format(**problem.fields())
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(problem.fields())
        raise DataError(f"task.eval_prefill = {template!r}: cannot be filled ({error}); it may name {known}") from error


def paired_interval(
    before: Sequence[bool], after: Sequence[bool], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % bootstrap interval of accuracy(after) - accuracy(before), resampling the problems that both answered."""
    difference = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(difference), (resamples, len(difference)), generator=generator)
    low, high = difference[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
