"""A float16 model's gradients, against the same model in float32: neither lost below 6e-8 nor beyond 65504."""

from __future__ import annotations

import json

import pytest
import torch

from longgrpo.config.run import build_config
from longgrpo.run.trainer import Trainer
from longgrpo.train import loop
from longgrpo.train.loss_scale import loss_scales, unscale

FROM_FLOAT32 = 2e-3  # of the gradient's length: four roundings of 2^-11


@pytest.fixture
def start(tree, tmp_path):
    tree["train"]["probe_prompts"] = tree["task"]["eval_n"] = 0
    tree["rollout"]["importance"] = "none"

    def build(dtype, **groups):
        model = tree["model"] | {"dtype": dtype}
        return Trainer(build_config(tree | groups | {"model": model}), tmp_path / dtype)

    return build


def gradients(start, size, **groups):
    """Of one rollout's loss, `size` times as large, by both models."""
    policies = {dtype: start(dtype, **groups).policy for dtype in ("float32", "float16")}
    problems = loop.sample_prompts(policies["float32"], 3)
    samples = loop.roll_out(policies["float32"], problems, 1)
    loop.reward(policies["float32"], problems, samples, 1)
    active = loop.advantage(policies["float32"], samples)
    for sample in active:
        sample.advantage *= size
    found = {}
    for dtype, policy in policies.items():
        metrics = loop.loss_and_backward(policy, samples, active)
        gradient = torch.cat([p.grad.double().flatten() for p in policy.parameters.values() if p.grad is not None])
        found[dtype] = gradient, metrics
    return found


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 4}, None])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_the_gradient_is_that_of_float32(size, lora, start):
    found = gradients(start, size, lora=lora)
    expected, gradient = found["float32"][0], found["float16"][0]
    assert (gradient - expected).norm() < FROM_FLOAT32 * expected.norm()


def test_a_scale_that_overflows_is_followed_by_a_smaller_one():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([1.0, torch.inf]), torch.ones(2)
    first, second, *_, last = loss_scales("float16")
    assert not unscale(parameters, first)
    assert [p.grad for p in parameters] == [None] * 3
    parameters[0].grad = torch.tensor([3.0, second])
    assert unscale(parameters, second)
    assert parameters[0].grad.tolist() == [3.0 / second, 1.0]
    parameters[0].grad = torch.full((2,), torch.nan)
    assert unscale(parameters, last)  # what is not finite at 1 either is for the step to tell of
    assert parameters[0].grad.isnan().all()


def test_a_whole_run(tree, tmp_path):
    """Self-test, rehearsal and steps."""
    tree["model"]["dtype"] = "float16"
    Trainer(build_config(tree), tmp_path / "run").run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(line["grad_norm"] > 0 for line in lines[1:])
