"""Rewards and advantages by turn."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError, RewardError
from longgrpo.rollout import Completion
from longgrpo.rollout.protocol import Turn
from longgrpo.tasks.data import Problem
from longgrpo.tasks.episodes import Episode
from longgrpo.tasks.rewards import Reward, Rewarding, turn_returns
from longgrpo.tasks.sample import Sample
from longgrpo.train.advantages import EPSILON, turn_advantages
from longgrpo.train.packing import pack
from testing import OWN_TOOLS
from testing.steps import rollout_of

VALUES = st.floats(-10, 10, allow_nan=False).map(lambda value: round(value, 3))
GROUPS = st.lists(st.lists(st.lists(VALUES, max_size=4), min_size=2, max_size=5), min_size=1, max_size=3)


@given(groups=GROUPS, scale=st.sampled_from(["group", "none"]))
def test_a_turn_is_compared_with_the_same_turn_of_the_others(groups, scale):
    found = turn_advantages(groups, scale)
    for group, own in zip(groups, found, strict=True):
        assert [len(member) for member in own] == [len(member) for member in group]
        for i, member in enumerate(group):
            for turn, value in enumerate(member):
                same = [other[turn] for other in group if len(other) > turn]
                expected = value - fmean(same)
                if max(same) == min(same):
                    expected = 0.0
                elif scale == "group":
                    expected /= stdev(same) + EPSILON
                assert own[i][turn].item() == pytest.approx(expected, abs=1e-5)


def test_by_batch_all_returns_have_one_divisor():
    groups = [[[1.0, 2.0], [3.0]], [[5.0], [9.0]]]
    found = turn_advantages(groups, "batch")
    divisor = stdev([1.0, 2.0, 3.0, 5.0, 9.0]) + EPSILON
    assert [x.item() for group in found for member in group for x in member] == pytest.approx(
        [-1 / divisor, 0.0, 1 / divisor, -2 / divisor, 2 / divisor], abs=1e-6
    )


def talk(turns=3):
    """An episode whose turns have 1, 2, ... tokens, with one given token between them."""
    ids, places = [], []
    for n in range(turns):
        begin = len(ids)
        ids += [10 + n] * (n + 1)
        places.append(Turn(begin, len(ids)))
        ids += [99] if n + 1 < turns else []
    messages = [{"role": role, "content": "x"} for _ in range(turns) for role in ("assistant", "tool")][:-1]
    sampled = sum(turn.end - turn.begin for turn in places)
    completion = Completion(ids, [0.0] * sampled, "stop", None, tuple(places))
    return Sample(0, [1, 2], completion, "", episode=Episode("q", {}, messages=messages))


def test_a_turn_has_earned_what_came_from_it_on():
    sample = talk()
    by_turn, whole, off = Reward("t", None, 2.0), Reward("w", None, 0.5), Reward("off", None)
    sample.turn_rewards = {"t": [1.0, 0.0, 4.0]}
    assert turn_returns(sample, [5.0, 3.0, math.nan], [by_turn, whole, off]) == [11.5, 9.5, 9.5]
    assert turn_returns(sample, [math.nan] * 3, [by_turn, whole, off]) == []


def test_a_function_may_return_a_value_for_each_turn():
    samples = [talk(3), talk(1)]
    rewarding = Rewarding([Reward("t", lambda completions, **_: [[1.0, 2.0, 4.0], 5.0])])
    values = rewarding.finish([Problem("q", "q", {})] * 2, samples, None)
    assert values.tolist() == [[7.0, 5.0]]
    assert [sample.turn_rewards for sample in samples] == [{"t": [1.0, 2.0, 4.0]}, {}]


@pytest.mark.parametrize("own", [[1.0], [1.0, None, 2.0], [1.0, math.nan, 2.0], [1.0] * 5])
def test_values_by_turn_are_one_number_each(own):
    rewarding = Rewarding([Reward("t", lambda completions, **_: [own])])
    with pytest.raises(RewardError, match="values by turn are 3 finite numbers"):
        rewarding.finish([Problem("q", "q", {})], [talk(3)], None)


def test_each_sampled_token_has_its_turns_advantage():
    rollout = rollout_of([talk(2), talk(3)])
    rollout.turn_advantages = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])]
    batch = pack(rollout, [1, 0])
    assert batch.tokens.advantages.tolist() == [3, 4, 4, 5, 5, 5, 1, 2, 2]
    assert batch.target.tolist() == [10, 11, 11, 12, 12, 12, 10, 11, 11]


@pytest.mark.parametrize(
    "other",
    [{"loss": {"importance_level": "sequence"}}, {"train": {"aggregation": "normalize_then_sum"}}, {"task": {}}],
)
def test_where_it_makes_no_sense_it_is_refused(tree, other):
    tree["train"]["advantage_level"] = "turn"
    if "task" not in other:
        tree["task"]["environment"] = f"{OWN_TOOLS}:Guess"
    for group, values in other.items():
        tree.setdefault(group, {}).update(values)
    with pytest.raises(ConfigError, match="advantage_level: turn is about episodes"):
        build_config(tree)
