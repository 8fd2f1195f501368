"""A gradient that is not finite changes no weight, and several in a row end the run with their cause."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from longgrpo.config.run import build_config
from longgrpo.errors import TrainingError
from longgrpo.run.trainer import Trainer
from longgrpo.train import loop
from longgrpo.train.nonfinite import diagnose


@pytest.fixture
def start(tree, tmp_path):
    tree["train"] |= {"probe_prompts": 0, "save_steps": 1}
    tree["task"]["eval_n"] = 0

    def build(**groups):
        return Trainer(build_config(tree | groups), tmp_path / "run")

    return build


def spoil(policy, backwards):
    """Makes the gradient of one parameter infinite or NaN in some of the coming backwards; returns its name."""
    name, parameter = next(iter(policy.parameters.items()))
    calls = iter(range(1, 100))
    values = (-torch.inf, torch.inf, torch.nan)
    parameter.register_hook(lambda gradient: gradient * (values[n % 3] if (n := next(calls)) in backwards else 1.0))
    return name


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.parameters.items()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_update_is_left_out_and_the_run_goes_on(start, tmp_path):
    running = start()
    spoil(running.policy, {1, 2})
    untrained = weights(running.policy)
    for number in (1, 2):
        result = loop.step(running.policy, number)
        assert result.metrics["updates_left_out"] == 1
        assert "grad_norm" not in result.metrics
        assert same(weights(running.policy), untrained)
        assert not running.policy.optimizer.state
    assert loop.step(running.policy, 3).metrics["grad_norm"] > 0
    assert running.policy.left_out == 0
    assert not same(weights(running.policy), untrained)


def test_several_in_a_row_end_the_run(start, tmp_path):
    running = start()
    name = spoil(running.policy, range(1, 100))
    expected = rf"(?s)step 3: .*3 times in a row: 1 gradients, first that of {name}.*backward.*saved at step 2; go on"
    with pytest.raises(TrainingError, match=expected):
        running.run()
    assert [line.get("updates_left_out") for line in metrics(tmp_path / "run")] == [1, 1]
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed.policy.left_out == 2  # the count goes on where it was
    spoil(resumed.policy, range(1, 100))
    with pytest.raises(TrainingError, match="step 3"):
        resumed.run()


def test_metrics_stay_json(start, tmp_path, monkeypatch):
    right = loop.grpo_loss
    monkeypatch.setattr(loop, "grpo_loss", lambda *a, **k: right(*a, **k)._replace(loss=a[0].sum() * torch.nan))
    with pytest.raises(TrainingError):
        start().run()
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [None, None]
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.fixture
def scored(start):
    """A policy, and samples on their way through a step."""
    policy = start(loss={"beta": 0.05}).policy
    problems = loop.sample_prompts(policy, 2)
    samples = loop.roll_out(policy, problems, 1)
    loop.reward(policy, problems, samples, 1)
    loop.score(policy, loop.advantage(policy, samples))
    return policy, samples


def test_each_cause_is_told_from_the_others(scored):
    policy, samples = scored
    assert "backward overflows" in diagnose(policy, samples)

    samples[1].advantage = torch.nan
    assert diagnose(policy, samples).startswith("the advantages of 1 of 8 completions")
    samples[0].ref_logp[0] = -torch.inf
    assert diagnose(policy, samples).startswith("the reference's logprobs of 1 of 8")
    hook = policy.model.get_base_model().model.norm.register_forward_hook(lambda *a: a[2] * torch.inf)
    assert diagnose(policy, samples).startswith("the trainer's logprobs of 8 of 8")
    hook.remove()
    completion = samples[2].completion
    samples[2].completion = replace(completion, logprobs=[torch.nan] * len(completion.logprobs))
    assert diagnose(policy, samples).startswith("the engine's logprobs of 1 of 8")
    name, weight = list(policy.model.named_parameters())[3]
    weight.data.view(-1)[0] = torch.nan
    assert diagnose(policy, samples).startswith(f"1 weights, first that of {name}; go back to a checkpoint")
