"""A float16 model's gradients, against the same model in float32: neither lost below 6e-8 nor beyond 65504."""

from __future__ import annotations

import json

import pytest
import torch

from longgrpo.config.run import build_config
from longgrpo.run.trainer import Trainer
from longgrpo.train import loop
from longgrpo.train.loss_scale import loss_scales
from longgrpo.train.update import plan_updates
from testing.steps import collected

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
    loops = {dtype: start(dtype, **groups).loop for dtype in ("float32", "float16")}
    rollout = collected(loops["float32"])
    rollout.advantages *= size
    found = {}
    for dtype, running in loops.items():
        (update,) = plan_updates(running.config, rollout, torch.device("cpu"))
        norm, metrics = loop.loss_and_backward(running.loss, running.state, update)
        gradient = torch.cat([g.double().flatten() for g in running.state.gradients.values()])
        assert norm == pytest.approx(gradient.norm().item(), rel=1e-5)
        found[dtype] = gradient, metrics
    return found


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 4}, None])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_the_gradient_is_that_of_float32(size, lora, start):
    found = gradients(start, size, lora=lora)
    expected, gradient = found["float32"][0], found["float16"][0]
    assert (gradient - expected).norm() < FROM_FLOAT32 * expected.norm()


def test_a_scale_that_overflows_is_followed_by_a_smaller_one(start, monkeypatch):
    """The gradient of each try is infinite until a scale is small enough; what is left is that of no scale."""
    running = start("float16").loop
    first, second, *_ = loss_scales("float16")
    (update,) = plan_updates(running.config, collected(running), torch.device("cpu"))
    tried = []
    accumulate = loop._accumulate

    def overflows(loss, state, update, scale):
        tried.append(scale)
        meter = accumulate(loss, state, update, scale)
        if scale == first:
            next(iter(state.gradients.values())).view(-1)[0] = torch.inf
        return meter

    expected, _ = loop.loss_and_backward(running.loss, running.state, update)
    gradients = {name: gradient.clone() for name, gradient in running.state.gradients.items()}
    running.state.optimizer.zero_grad()
    monkeypatch.setattr(loop, "_accumulate", overflows)
    norm, _ = loop.loss_and_backward(running.loss, running.state, update)
    assert tried == [first, second]
    assert norm == pytest.approx(expected, rel=1e-2)
    for name, gradient in running.state.gradients.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-2, atol=1e-4)


def test_a_gradient_that_no_scale_helps_is_told_of(start):
    running = start("float16").loop
    (update,) = plan_updates(running.config, collected(running), torch.device("cpu"))
    next(iter(running.state.parameters.values())).register_hook(lambda gradient: gradient * torch.nan)
    norm, _ = loop.loss_and_backward(running.loss, running.state, update)
    assert norm != norm


def test_a_whole_run(tree, tmp_path):
    """Self-test, rehearsal and steps."""
    tree["model"]["dtype"] = "float16"
    Trainer(build_config(tree), tmp_path / "run").run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(line["grad_norm"] > 0 for line in lines[1:])
