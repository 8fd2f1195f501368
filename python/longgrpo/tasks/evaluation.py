"""Accuracy on held-out problems, greedy and of several samples, with what chance leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import comb
from statistics import fmean

import torch

from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.sampling import Sampling
from longgrpo.errors import DataError
from longgrpo.rollout.protocol import RolloutEngine, seed_for
from longgrpo.tasks.data import Problem, columns_of, decode
from longgrpo.tasks.episodes import Conversations, Episode, group_prompt
from longgrpo.tasks.event_loop import EventLoop
from longgrpo.tasks.prompts import Prompts
from longgrpo.tasks.rewards import Reward, environments_of
from longgrpo.tasks.sample import Sample


@dataclass(frozen=True)
class HeldOut:
    """A held-out set: P problems, the function that says whether one is solved, and how many replies are sampled."""

    problems: list[Problem]
    reward: Reward
    samples: int = 0  # K
    seed: int = 0
    """The seeds of the sampled replies are derived from it, the same in every evaluation."""
    turns: bool = True
    """Whether tools and environment answer, in a run that has them."""
    places: Sequence[int] | None = None
    """Of the problems in the whole set, if they are a part of it: seeds come from these."""

    def part(self, rank: int, world: int) -> HeldOut:
        """Every world-th problem, from number `rank` on."""
        if world == 1:
            return self
        return replace(self, problems=self.problems[rank::world], places=range(rank, len(self.problems), world))


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
    conversations: Conversations | None = None,
    loop: EventLoop | None = None,
) -> Evaluation:
    """Greedy replies, and sampled ones if the set asks for them; but for the temperature of the greedy ones, the
    requests are training's. With `prefill`, each reply begins with that template, and the reward sees what follows.
    An async reward runs on `loop`, if given, as in training.

    Raises DataError for a prefill that names what a problem does not have.
    """
    problems, count = held_out.problems, held_out.samples
    places = range(len(problems)) if held_out.places is None else held_out.places
    prefixes = [_filled(prefill, problem) if prefill else "" for problem in problems]
    talks = conversations if held_out.turns and not prefill else None

    def scored(times: int, sampling: Sampling, seeds: Sequence[int]) -> tuple[list[str], list[float]]:
        asked = [(problem, prefix) for problem, prefix in zip(problems, prefixes, strict=True) for _ in range(times)]
        engine.drop_caches()  # whatever was sampled before, the replies are the same
        episodes: Sequence[Episode | None] = [None] * len(asked)
        if talks:
            games = [seed_for(held_out.seed, 0, i, -1) for i in places for _ in range(times)]
            episodes = begun = talks.begin([problem for problem, _ in asked], games)
            asked = [(group_prompt(problem, [e]), "") for (problem, _), e in zip(asked, begun, strict=True)]
        encoded = [prompts.encode(problem, prefix) for problem, prefix in asked]
        with talks.closing_on_error(begun) if talks else nullcontext():
            completions = engine.generate(encoded, sampling, seeds, None, talks.turns(begun) if talks else None)
        replies = decode(prompts.tokenizer, completions, sampling.skip_special_tokens)
        answered = zip(encoded, completions, replies, episodes, strict=True)
        samples = [Sample(i, *sample[:3], episode=sample[3]) for i, sample in enumerate(answered)]
        if talks:
            for episode, completion in zip(begun, completions, strict=True):
                talks.end(episode, completion)
        # In a run with turns the control without them is scored by functions that read conversations.
        sent = held_out.reward.sees_sent or conversations is not None
        scores = _scores(held_out.reward, [problem for problem, _ in asked], samples, sent, loop)
        if talks:
            talks.close_episodes(begun)
        return replies, scores

    questions = [problem.question for problem in problems]
    if not problems:  # fewer than there are ranks
        return Evaluation([], [], [], reward=held_out.reward.name)
    replies, scores = scored(1, rollout.request(temperature=0.0), [0] * len(problems))
    if prefill or not count:
        return Evaluation(questions, replies, scores, reward=held_out.reward.name)
    seeds = [seed_for(held_out.seed, 0, i, j) for i in places for j in range(count)]
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
    reward: Reward, problems: Sequence[Problem], samples: Sequence[Sample], sent: bool, loop: EventLoop | None = None
) -> list[float]:
    """One score a reply, 0 if the function does not apply or the episode failed. sent: see Problem.form."""
    from transformers import TrainerState

    scores = reward(
        [sample.prompt(problem, sent) for problem, sample in zip(problems, samples, strict=True)],
        [sample.reply(problem, sent) for problem, sample in zip(problems, samples, strict=True)],
        [sample.completion.sampled_ids for sample in samples],
        columns_of(problems) | environments_of(samples),
        TrainerState(),
        loop,
    )
    found: list[float] = scores.values.nan_to_num(nan=0.0).tolist()
    return [0.0 if sample.failed else score for sample, score in zip(samples, found, strict=True)]


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
