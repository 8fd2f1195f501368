"""From an update to the next rollout: masters, the probe, and the support that both engines sample from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError, WeightSyncError
from longgrpo.run.trainer import Trainer
from longgrpo.train.loop import step


def trainer(tree, directory):
    return Trainer(build_config(tree), directory)


def shift_logprobs(engine, by):
    """The engine says that each token was less likely than it was."""
    generate = engine.generate

    def shifted(completion):
        return dataclasses.replace(completion, logprobs=[x - by for x in completion.logprobs])

    def replacement(prompts, sampling, seeds, finished=None, turns=None):
        tell = (lambda i, completion: finished(i, shifted(completion))) if finished else None
        return [shifted(completion) for completion in generate(prompts, sampling, seeds, tell, turns)]

    engine.generate = replacement


def test_every_step_is_probed(tree, tmp_path):
    running = trainer(tree, tmp_path / "run").loop
    for number in (1, 2):
        metrics = step(running, number).metrics
        assert metrics["probe_logprob_diff"] <= 1e-5
        assert metrics["weight_sync_bytes"] == 0


def test_an_engine_that_runs_something_else_stops_the_run(tree, tmp_path):
    tree["train"]["probe_prompts"] = 0  # the self-test before step 1 would find it
    running = trainer(tree, tmp_path / "run")
    shift_logprobs(running.loop.collector.engine, 0.01)
    with pytest.raises(WeightSyncError, match=r"after this step, .* off the trainer's by 0\.01 nats"):
        running.run()
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))  # the weights had moved already


@pytest.mark.parametrize("importance", ["token_truncate", "sequence_mask"])
def test_on_policy_the_ratio_is_one_on_a_truncated_support(tree, tmp_path, importance):
    tree["rollout"] |= {"temperature": 1.5, "sampling": {"min_p": 0.1}, "importance": importance}
    running = trainer(tree, tmp_path / "run").loop
    for number in (1, 2, 3):
        metrics = step(running, number).metrics
        assert abs(metrics["importance_ratio_mean"] - 1) <= 1e-3
        assert metrics["importance_cut"] == 0
        assert metrics["engine_trainer_logprob_diff_max"] <= 5e-4


def test_the_ratio_weighs_the_gradient(tree, tmp_path):
    """An engine that says it was half as likely to sample each token gets each gradient twice."""
    tree["train"]["max_grad_norm"] = float("inf")
    gradients = []
    for shift in (0.0, 0.5):
        running, kept = trainer(tree, tmp_path / str(shift)).loop, []
        shift_logprobs(running.collector.engine, shift)
        running.state.optimizer.step = lambda state=running.state, kept=kept: kept.extend(
            gradient.clone() for gradient in state.gradients.values()
        )
        running.probe.tolerance = 1.0
        step(running, 1)
        gradients.append(kept)
    assert any(g.abs().max() > 1e-4 for g in gradients[0])
    for plain, weighted in zip(*gradients, strict=True):
        torch.testing.assert_close(weighted, plain * torch.tensor(0.5).exp(), rtol=1e-3, atol=1e-6)


def test_bf16_full_fine_tuning_keeps_masters_and_resumes(tree, tmp_path):
    del tree["lora"]
    tree["model"]["dtype"] = "bfloat16"
    tree["train"] |= {"steps": 3, "save_steps": 2, "learning_rate": 1e-4}
    whole = trainer(tree, tmp_path / "whole")
    whole.run()
    tree["train"]["steps"] = 2
    trainer(tree, tmp_path / "part").run()
    Trainer.resume(tmp_path / "part", ["--train.steps", "3"]).run()
    states = [load_file(tmp_path / name / "checkpoints/step-000003/state.safetensors") for name in ("whole", "part")]
    assert {t.dtype for name, t in states[0].items() if name.startswith("weight.")} == {torch.float32}
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    for name, parameter in whole.loop.state.model.named_parameters():
        assert torch.equal(parameter, states[0][f"weight.{name}"].bfloat16())


def test_what_an_engine_refuses_is_said_like_any_wrong_config(tree, tmp_path):
    tree["rollout"]["sampling"] = {"stop": ["END"]}
    with pytest.raises(ConfigError, match=r"stop needs rollout\.engine: vllm"):
        trainer(tree, tmp_path / "run")
    tree["rollout"]["sampling"] = {"topp": 0.5}
    with pytest.raises(ConfigError, match="did you mean 'top_p'"):
        build_config(tree)
