import math

import torch

from longgrpo.train.advantages import group_advantages, has_spread


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
