"""A gradient that is not finite changes no weight, and several in a row end the run with their cause."""

from __future__ import annotations

import json

import pytest
import torch

from longgrpo.config.run import build_config
from longgrpo.errors import TrainingError
from longgrpo.run.trainer import Trainer
from longgrpo.train import loop, losses
from longgrpo.train.skip import diagnose
from testing.steps import rolled_out


@pytest.fixture
def start(tree, tmp_path):
    tree["train"] |= {"probe_prompts": 0, "save_steps": 1}
    tree["task"]["eval_n"] = 0

    def build(**groups):
        return Trainer(build_config(tree | groups), tmp_path / "run")

    return build


def spoil(state, backwards):
    """Makes the gradient of one parameter infinite or NaN in some of the coming backwards; returns its name."""
    name, parameter = next(iter(state.parameters.items()))
    calls = iter(range(1, 100))
    values = (-torch.inf, torch.inf, torch.nan)
    parameter.register_hook(lambda gradient: gradient * (values[n % 3] if (n := next(calls)) in backwards else 1.0))
    return name


def weights(state):
    return {name: p.detach().clone() for name, p in state.parameters.items()}


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_update_is_skipped_and_the_run_goes_on(start, tmp_path):
    running = start()
    spoil(running.loop.state, {1, 2})
    untrained = weights(running.loop.state)
    for number in (1, 2):
        result = loop.step(running.loop, number)
        assert result.metrics["skipped_updates"] == 1
        assert "grad_norm" not in result.metrics
        assert same(weights(running.loop.state), untrained)
        assert not running.loop.state.optimizer.state
    assert loop.step(running.loop, 3).metrics["grad_norm"] > 0
    assert running.loop.state.skipped_updates == 0
    assert not same(weights(running.loop.state), untrained)


def test_several_in_a_row_end_the_run(start, tmp_path):
    running = start()
    name = spoil(running.loop.state, range(1, 100))
    expected = rf"(?s)step 3: .*3 times in a row: 1 gradients, first that of {name}.*backward.*saved at step 2; go on"
    with pytest.raises(TrainingError, match=expected):
        running.run()
    assert [line.get("skipped_updates") for line in metrics(tmp_path / "run")] == [1, 1]
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed.loop.state.skipped_updates == 2  # the count goes on where it was
    spoil(resumed.loop.state, range(1, 100))
    with pytest.raises(TrainingError, match="step 3"):
        resumed.run()


def test_metrics_stay_json(start, tmp_path, monkeypatch):
    right = losses.linear_grpo_loss
    monkeypatch.setattr(
        losses, "linear_grpo_loss", lambda *a, **k: right(*a, **k)._replace(loss=a[0].sum() * torch.nan)
    )
    with pytest.raises(TrainingError):
        start().run()
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [None, None]
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


@pytest.fixture
def scored(start):
    """The state, and a scored micro-batch of 12 samples."""
    running = start(loss={"beta": 0.05}).loop
    (batch,) = rolled_out(running)[1].batches
    return running.config, running.state, batch


def test_each_cause_is_told_from_the_others(scored):
    config, state, batch = scored

    def diagnosis():
        return diagnose(config, state, [batch])

    assert "backward overflows" in diagnosis()
    batch.tokens.advantages[1] = torch.nan
    assert diagnosis().startswith("the advantages of 1 of 12 completions")
    batch.tokens.ref_logp[0] = -torch.inf
    assert diagnosis().startswith("the reference's logprobs of 1 of 12")
    hook = state.model.get_base_model().model.norm.register_forward_hook(lambda *a: a[2] * torch.inf)
    assert diagnosis().startswith("the trainer's logprobs of 12 of 12")
    hook.remove()
    batch.tokens.sampling_logp[-1] = torch.nan
    assert diagnosis().startswith("the engine's logprobs of 1 of 12")
    name, weight = list(state.model.named_parameters())[3]
    weight.data.view(-1)[0] = torch.nan
    assert diagnosis().startswith(f"1 weights, first that of {name}; go back to a checkpoint")
