import math

import torch

from longgrpo.train.advantages import advantages, group_advantages, groups_with_spread, has_spread, weighted_sum


def test_scaled_by_the_group_as_trl_does():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 4.0, 1.0]], dtype=torch.float64)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(group_advantages(rewards, "group"), expected.float())


def test_unscaled():
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert group_advantages(rewards, "none").tolist() == [[0.5, -0.5]]


def test_without_spread_exactly_zero():
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert rewards.mean() != 0.1  # the mean of equal floats differs from them: rounding must not look like signal
    assert group_advantages(rewards).eq(0).all()
    assert not has_spread(rewards).any()


def test_a_completion_without_reward_has_no_part_in_its_group():
    rewards = torch.tensor([[1.0, math.nan, 0.0], [math.nan] * 3, [math.nan, math.nan, 1.0]], dtype=torch.float64)
    got = group_advantages(rewards, "none")
    assert got.tolist() == [[0.5, 0.0, -0.5], [0.0] * 3, [0.0] * 3]
    assert has_spread(rewards).tolist() == [True, False, False]
    scaled = group_advantages(rewards, "group")[0, 0].item()
    assert math.isclose(scaled, 0.5 / (math.sqrt(0.5) + 1e-4), rel_tol=1e-6)


VALUES = torch.tensor(
    [[[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], [[0.0, 1.0, math.nan, 0.0], [math.nan, math.nan, 3.0, math.nan]]],
    dtype=torch.float64,
)  # [2 functions, 2 groups, 4 completions]
WEIGHTS = torch.tensor([1.0, 0.5], dtype=torch.float64)


def test_what_does_not_apply_is_left_out_of_the_sum():
    assert weighted_sum(VALUES, WEIGHTS).tolist() == [[1.0, 0.5, 0.0, 1.0], [2.0, 2.0, 3.5, 2.0]]
    assert weighted_sum(VALUES[1:], WEIGHTS[1:])[1].isnan().tolist() == [True, True, False, True]


def test_scaled_by_the_batch():
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5], [3.0, 1.0]], dtype=torch.float64)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)
    assert torch.allclose(group_advantages(rewards, "batch"), expected.float())


def test_normalized_before_the_sum_as_trl_does():
    """TRL 1.16's normalize_then_sum, restated: nan-aware group statistics of each function, summed, then over all."""

    def nanstd(x):
        known = x[~x.isnan()]
        return known.std() if len(known) > 1 else torch.tensor(0.0)

    normalized = torch.zeros_like(VALUES)
    for f in range(2):
        for p in range(2):
            group = VALUES[f, p]
            normalized[f, p] = (group - group.nanmean()) / (nanstd(group) + 1e-4)
    total = (normalized * WEIGHTS[:, None, None]).nansum(0)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    got = advantages(VALUES, WEIGHTS, "group", "normalize_then_sum")
    assert torch.allclose(got[0], expected[0].float(), atol=1e-6)
    assert got[1].eq(0).all()  # no function has spread there


def test_rewards_that_cancel_in_the_sum_teach_when_they_are_normalized_apart():
    opposed = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert not groups_with_spread(opposed, weights, "sum_then_normalize").any()
    assert groups_with_spread(opposed, weights, "normalize_then_sum").all()
    assert not groups_with_spread(opposed, torch.zeros(2, dtype=torch.float64), "normalize_then_sum").any()
