"""What the engine's own probability of a token does to its weight in the loss."""

import math

import pytest
import torch

from longgrpo.rollout import Completion, RolloutConfig
from longgrpo.tasks.sample import Sample
from longgrpo.train.packing import pack
from longgrpo.train.token_weights import engine_ratio, engine_weight

LOGP = torch.tensor([-1.0, -2.0, -3.0, -0.5, -0.5])
ENGINE = [-1.5, -2.0, -1.0, -0.6, -0.2]


def ratio_of(level, logp=LOGP, engine=ENGINE, lengths=(3, 2)):
    parts = torch.tensor(engine).split(lengths)
    samples = [Sample(i, [1], Completion([2] * len(part), part.tolist(), "stop"), "") for i, part in enumerate(parts)]
    return engine_ratio(logp, pack(samples), RolloutConfig(importance=f"{level}_truncate"))


def weight(ratio, **options):
    return engine_weight(ratio, RolloutConfig(**options))


def test_a_tokens_ratio():
    expected = [math.exp(0.5), 1.0, math.exp(-2.0), math.exp(0.1), math.exp(-0.3)]
    torch.testing.assert_close(ratio_of("token"), torch.tensor(expected))


def test_a_sequences_ratio_is_the_mean_over_its_tokens():
    first, second = math.exp((0.5 + 0.0 - 2.0) / 3), math.exp((0.1 - 0.3) / 2)
    torch.testing.assert_close(ratio_of("sequence"), torch.tensor([first] * 3 + [second] * 2))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_and_masked(level):
    ratio = torch.tensor([0.1, 0.4, 1.0, 1.9, 5.0])
    assert weight(ratio, importance=f"{level}_truncate").tolist() == pytest.approx([0.1, 0.4, 1.0, 1.9, 2.0])
    assert weight(ratio, importance=f"{level}_mask").tolist() == pytest.approx([0.0, 0.0, 1.0, 1.9, 0.0])
    assert weight(ratio, importance=f"{level}_mask", importance_cap=3.0).tolist() == pytest.approx([0, 0.4, 1, 1.9, 0])
    assert weight(ratio, importance="none").tolist() == [1] * 5


def test_a_truncated_ratio_makes_the_engines_mean_the_trainers():
    """Sampling from q and weighing by p / q is sampling from p: exactly so where no ratio reaches the cap."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50, generator=generator) + 1.0
    q = p * (1 + 0.3 * torch.rand(50, generator=generator))
    p, q, value = p / p.sum(), q / q.sum(), torch.randn(50, generator=generator)
    ratio = ratio_of("token", p.log(), q.log().tolist(), [1] * 50)
    corrected = (q * weight(ratio) * value).sum()
    torch.testing.assert_close(corrected, (p * value).sum())
    assert abs((q * value).sum() - (p * value).sum()) > 1e-3


def test_the_engines_support_follows_its_tokens():
    told = [Completion([2, 3], [-1.0, -1.0], "stop", [[2, 9], [3]]), Completion([4], [-1.0], "stop", [[4, 5]])]
    samples = [Sample(i, [1], completion, "") for i, completion in enumerate(told)]
    assert pack(samples).support == [[2, 9], [3], [4, 5]]
    samples[1].completion = Completion([4], [-1.0], "stop")
    assert pack(samples).support is None
