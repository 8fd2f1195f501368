"""What an evaluation asks the engine for, and what it makes of the answers."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.task import TaskConfig
from longgrpo.rollout.protocol import Completion
from longgrpo.tasks.data import Problem
from longgrpo.tasks.evaluation import Evaluation, HeldOut, evaluate, interval, paired_interval, pass_at
from longgrpo.tasks.prompts import Prompts
from longgrpo.tasks.rewards import Reward
from testing.tokenizer import character_tokenizer

PROBLEMS = [Problem(f"{i}?", f"{i}?", {"answer": str(i)}, i) for i in range(3)]


class Recorder:
    """An engine that answers each request with one letter, by its seed, and keeps what it was asked."""

    def __init__(self):
        self.requests = []

    def max_length(self):
        return 100

    def drop_caches(self):
        pass

    def generate(self, prompts, sampling, seeds, finished=None, turns=None):
        self.requests.append((prompts, sampling, list(seeds)))
        return [Completion([10 + seed % 20], [0.0], "stop") for seed in seeds]


def evaluated(sampling, samples=0, score=lambda completions, **_: [1.0] * len(completions)):
    engine = Recorder()
    rollout = RolloutConfig(sampling=sampling, temperature=0.7, max_completion_length=9)
    held_out = HeldOut(PROBLEMS, Reward("own", score), samples, seed=5)
    prompts = Prompts(character_tokenizer(), TaskConfig("own"), engine.max_length(), 9)
    return rollout, engine, evaluate(engine, prompts, held_out, rollout)


@pytest.mark.parametrize(
    "sampling",
    [{}, {"stop_token_ids": [4, 5]}, {"ignore_eos": True, "top_p": 0.9, "logit_bias": {3: 1.0}},
     {"stop": ["\n"], "repetition_penalty": 1.1, "allowed_token_ids": [3, 4]}],
)  # fmt: skip
def test_only_the_temperature_of_greedy_replies_differs_from_training(sampling):
    rollout, engine, _ = evaluated(sampling, samples=2)
    (_, greedy, _), (_, sampled, _) = engine.requests
    assert sampled == rollout.request()
    assert greedy.temperature == 0
    assert dataclasses.replace(greedy, temperature=0.7) == rollout.request()


def test_every_sample_has_a_seed_of_its_own_and_the_same_one_the_next_time():
    (_, first, result), (_, again, _) = evaluated({}, samples=4), evaluated({}, samples=4)
    prompts, _, seeds = first.requests[1]
    assert len(set(seeds)) == 12
    assert seeds == again.requests[1][2]
    assert prompts == [prompt for prompt in prompts[::4] for _ in range(4)]
    assert [len(texts) for texts in result.samples] == [4, 4, 4]
    assert result.samples[1] == [character_tokenizer().decode([10 + seed % 20]) for seed in seeds[4:8]]


def test_a_problem_is_scored_by_its_own_columns():
    def own(completions, answer, **columns):
        return [float(right == "1") for right in answer]

    _, _, result = evaluated({}, samples=3, score=own)
    assert result.scores == [0, 1, 0]
    assert result.sample_scores == [[0] * 3, [1] * 3, [0] * 3]


@pytest.mark.parametrize(("count", "right"), [(n, c) for n in (1, 2, 5, 8) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_all_choices_with_a_right_one(count, right):
    replies = [i < right for i in range(count)]
    for k in range(1, count + 1):
        choices = [any(choice) for choice in itertools.combinations(replies, k)]
        assert pass_at(k, count, right) == pytest.approx(sum(choices) / len(choices))


def test_the_metrics_of_an_evaluation():
    scores = [[1, 0, 0, 0, 0, 1], [0] * 6, [1] * 6]
    metrics = Evaluation(["a", "b", "c"], ["", "", ""], [1.0, 0.5, 1.0], [], scores).metrics()
    assert {name for name in metrics if not name.endswith(("_low", "_high"))} == {
        "accuracy", "mean_at_6", "pass_at_2", "pass_at_4", "pass_at_6"
    }  # fmt: skip
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["mean_at_6"] == pytest.approx((2 / 6 + 0 + 1) / 3)
    assert metrics["pass_at_2"] == pytest.approx((1 - 6 / 15 + 0 + 1) / 3)
    assert metrics["pass_at_6"] == pytest.approx(2 / 3)
    for name in ("accuracy", "mean_at_6", "pass_at_4"):
        assert 0 <= metrics[f"{name}_low"] < metrics[name] < metrics[f"{name}_high"] <= 1
    assert set(Evaluation(["a"], [""], [1.0]).metrics()) == {"accuracy", "accuracy_low", "accuracy_high"}


def test_the_interval_is_that_of_the_binomial():
    draw = random.Random(0)
    values = [float(draw.random() < 0.3) for _ in range(400)]
    share = sum(values) / len(values)
    low, high = interval(values)
    half = 1.96 * math.sqrt(share * (1 - share) / len(values))
    assert low == pytest.approx(share - half, abs=half / 10)
    assert high == pytest.approx(share + half, abs=half / 10)
    assert interval([1.0] * 7) == (1.0, 1.0)
    before, after = [True, False] * 50, [True] * 100  # half of the problems are gained
    assert paired_interval(before, after) == pytest.approx((0.5 - 0.098, 0.5 + 0.098), abs=0.01)
