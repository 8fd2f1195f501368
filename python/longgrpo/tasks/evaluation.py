"""Accuracy on held-out problems, greedy and of several samples, with what chance leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from statistics import fmean

import torch

from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.sampling import Sampling
from longgrpo.errors import DataError
from longgrpo.rollout.protocol import RolloutEngine, seed_for
from longgrpo.tasks.data import Problem, as_reply, columns_of, decode
from longgrpo.tasks.prompts import Prompts
from longgrpo.tasks.rewards import Reward


@dataclass(frozen=True)
class HeldOut:
    """A held-out set: P problems, the function that says whether one is solved, and how many replies are sampled."""

    problems: list[Problem]
    reward: Reward
    samples: int = 0  # K
    seed: int = 0
    """The seeds of the sampled replies are derived from it, the same in every evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """One entry a problem, in the order of the problems."""

    questions: list[str]
    replies: list[str]
    """Greedy."""
    scores: list[float]
    samples: list[list[str]] = field(default_factory=list)
    """[P][K]: sampled as training samples."""
    sample_scores: list[list[float]] = field(default_factory=list)
    reward: str = ""
    """The function that scored; empty in a file of an earlier version."""

    @property
    def solved(self) -> list[bool]:
        return [score >= 1.0 for score in self.scores]

    @property
    def accuracy(self) -> float:
        return sum(self.solved) / len(self.solved)

    def metrics(self) -> dict[str, float]:
        """accuracy, mean_at_K and pass_at_k for the powers of two up to K and for K, each with the ends of its 95 %
        interval, NAME_low and NAME_high."""
        shares: dict[str, list[float]] = {"accuracy": [float(solved) for solved in self.solved]}
        if self.sample_scores:
            count = len(self.sample_scores[0])
            right = [sum(score >= 1.0 for score in scores) for scores in self.sample_scores]
            shares[f"mean_at_{count}"] = [n / count for n in right]
            for k in (k for k in range(2, count + 1) if k == count or k & (k - 1) == 0):
                shares[f"pass_at_{k}"] = [pass_at(k, count, n) for n in right]
        found: dict[str, float] = {}
        for name, values in shares.items():
            low, high = interval(values)
            found |= {name: fmean(values), f"{name}_low": low, f"{name}_high": high}
        return found


def pass_at(k: int, count: int, right: int) -> float:
    """The chance that one of k replies is right, estimated without bias from `count` replies of which `right` are:
    1 - C(count - right, k) / C(count, k) (Chen et al. 2021, arXiv:2107.03374, equation 1)."""
    return 1 - comb(count - right, k) / comb(count, k)


def evaluate(
    engine: RolloutEngine,
    prompts: Prompts,
    held_out: HeldOut,
    rollout: RolloutConfig,
    prefill: str | None = None,
) -> Evaluation:
    """Greedy replies, and sampled ones if the set asks for them; but for the temperature of the greedy ones, the
    requests are training's. With `prefill`, each reply begins with that template, and the reward sees what follows.

    Raises DataError for a prefill that names what a problem does not have.
    """
    problems, count = held_out.problems, held_out.samples
    prefixes = [_filled(prefill, problem) if prefill else "" for problem in problems]
    encoded = [prompts.encode(problem, prefix) for problem, prefix in zip(problems, prefixes, strict=True)]

    def scored(times: int, sampling: Sampling, seeds: Sequence[int]) -> tuple[list[str], list[float]]:
        asked = [problem for problem in problems for _ in range(times)]
        engine.drop_caches()  # whatever was sampled before, the replies are the same
        completions = engine.generate([ids for ids in encoded for _ in range(times)], sampling, seeds)
        replies = decode(prompts.tokenizer, completions, sampling.skip_special_tokens)
        return replies, _scores(held_out.reward, asked, replies, [c.token_ids for c in completions])

    questions = [problem.question for problem in problems]
    replies, scores = scored(1, rollout.request(temperature=0.0), [0] * len(problems))
    if prefill or not count:
        return Evaluation(questions, replies, scores, reward=held_out.reward.name)
    seeds = [seed_for(held_out.seed, 0, i, j) for i in range(len(problems)) for j in range(count)]
    samples, sample_scores = scored(count, rollout.request(), seeds)
    starts = range(0, len(samples), count)
    return Evaluation(
        questions,
        replies,
        scores,
        [samples[i : i + count] for i in starts],
        [sample_scores[i : i + count] for i in starts],
        held_out.reward.name,
    )


def _scores(
    reward: Reward, problems: Sequence[Problem], replies: Sequence[str], token_ids: list[list[int]]
) -> list[float]:
    """One score a reply, 0 if the function does not apply."""
    from transformers import TrainerState

    scores = reward(
        [problem.prompt for problem in problems],
        [as_reply(problem.prompt, text) for problem, text in zip(problems, replies, strict=True)],
        token_ids,
        columns_of(problems),
        TrainerState(),
    )
    found: list[float] = scores.values.nan_to_num(nan=0.0).tolist()
    return found


def _filled(template: str, problem: Problem) -> str:
    try:
        return template.format(**problem.fields())
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(problem.fields())
        raise DataError(f"task.eval_prefill = {template!r}: cannot be filled ({error}); it may name {known}") from error


def interval(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of `values`, one a problem: the problems are drawn again."""
    each = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(each), (resamples, len(each)), generator=generator)
    low, high = each[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired_interval(
    before: Sequence[bool], after: Sequence[bool], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % bootstrap interval of accuracy(after) - accuracy(before), resampling the problems that both answered."""
    return interval([float(b) - float(a) for a, b in zip(before, after, strict=True)], resamples, seed)
