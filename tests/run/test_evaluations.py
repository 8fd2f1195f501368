"""Evaluations of a run: they change nothing of it, choose its best checkpoint, and end it early."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError, RewardError
from longgrpo.run import checkpoint
from longgrpo.run.trainer import Trainer
from testing import OWN_DATA, OWN_REWARDS

CLOCKS = ("seconds", "tokens_per_second", "peak_", "measured_", "predicted_")


def trained(tree, directory):
    return Trainer(build_config(tree), directory).run()


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def accuracies(run):
    return {row["step"]: row["eval/accuracy"] for row in rows(run) if "eval/accuracy" in row}


@pytest.fixture
def scripted(tree, tmp_path):
    """A run whose evaluations solve a given number of the 8 problems, one after the other."""

    def of(solved, **train):
        own = tmp_path / "scripted.py"
        own.write_text(
            f"solved = iter({solved})\n"
            "def score(completions, **columns):\n"
            "    right = next(solved)\n"
            "    if right is None: raise KeyError('no such column')\n"
            "    return [float(i < right) for i in range(len(completions))]\n"
        )
        tree["task"] |= {"eval_reward": f"{own}:score", "eval_steps": 1}
        tree["train"] |= {"save_steps": 0, "keep_checkpoints": 1, **train}
        return tree

    return of


def test_evaluations_change_no_bit_of_the_training(tree, tmp_path):
    tree["task"] = {"name": f"{OWN_DATA}:thirty", "eval_n": 4}
    tree["rewards"] = [{"function": f"{OWN_REWARDS}:noisy_digits"}]  # draws from the global generators
    tree["train"]["best_metric"] = "reward/mean"
    trained(tree, tmp_path / "without")
    tree["task"] |= {"eval_steps": 1, "eval_samples": 3}
    trained(tree, tmp_path / "with")
    without, with_ = (
        [{k: v for k, v in row.items() if not k.startswith((*CLOCKS, "eval/"))} for row in rows(tmp_path / name)]
        for name in ("without", "with")
    )
    assert without == with_
    tables = [pyarrow.parquet.read_table(tmp_path / name / "completions") for name in ("without", "with")]
    assert tables[0].equals(tables[1])
    assert checkpoint.checkpoints(tmp_path / "without")[-1].name == "step-000004"
    states = [load_file(checkpoint.checkpoints(tmp_path / n)[-1] / "state.safetensors") for n in ("without", "with")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_an_evaluation_stands_in_the_row_of_its_step(tree, tmp_path):
    tree["task"] |= {
        "eval_steps": 3,
        "eval_samples": 2,
        "eval_sets": {"hard": {"name": f"{OWN_DATA}:thirty", "n": 5, "reward": f"{OWN_REWARDS}:digits"}},
    }
    summary = trained(tree, tmp_path / "run")
    assert set(accuracies(tmp_path / "run")) == {0, 3}
    row = rows(tmp_path / "run")[3]
    assert row["step"] == 3
    assert {"eval/mean_at_2", "eval/pass_at_2", "eval/hard/accuracy", "eval/hard/pass_at_2"} < row.keys()
    kept = json.loads((tmp_path / "run/evaluations/step-000003_hard.json").read_text())
    assert len(kept["replies"]) == len(kept["samples"]) == 5
    assert {len(samples) for samples in kept["samples"]} == {2}
    assert {"eval_after", "eval_after_hard", "eval_n_hard", "eval_diff_interval_hard"} < summary.keys()
    assert summary["eval_n_hard"] == 5


def test_no_set_is_trained_on(tree, tmp_path):
    tree["task"] = {
        "name": f"{OWN_DATA}:thirty", "eval_n": 4, "eval_sets": {"more": {"n": 6, "seed": 3}, "same": {"n": 2}}
    }  # fmt: skip
    trainer = Trainer(build_config(tree), tmp_path / "run")
    held_out = {problem.question for kept in trainer.evaluations.sets.values() for problem in kept.problems}
    assert 6 <= len(held_out) <= 12
    assert not held_out & {problem.question for problem in trainer.loop.collector.stream.take(60)}


def test_the_best_evaluation_is_kept_beside_the_newest(scripted, tmp_path):
    summary = trained(scripted([0, 1, 6, 2, 6], steps=4), tmp_path / "run")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-000002", "step-000004"]
    assert checkpoint.find(tmp_path / "run", "best").name == summary["best_checkpoint"] == "step-000002"
    assert accuracies(tmp_path / "run") == {0: 0, 1: 1 / 8, 2: 6 / 8, 3: 2 / 8, 4: 6 / 8}
    assert summary["eval_after"] == 6 / 8  # the evaluation of the last step, not done twice


def test_patience_ends_a_run(scripted, tmp_path):
    tree = scripted([0, 3, 4, 4, 2, 8], steps=9)
    tree["task"]["eval_patience"] = 2
    summary = trained(tree, tmp_path / "run")
    assert (summary["steps"], summary["stopped_early"], summary["best_checkpoint"]) == (4, True, "step-000002")
    again = Trainer.resume(tmp_path / "run")  # at its end it is at its end
    assert again.run()["steps"] == 4
    assert len(rows(tmp_path / "run")) == 5


def test_patience_is_resumed(scripted, tmp_path):
    tree = scripted([0, 3, 2], steps=2)
    tree["task"]["eval_patience"] = 2
    trained(tree, tmp_path / "run")
    scripted([1, 1], steps=9)
    overrides = ["--train.steps", "9"]
    assert Trainer.resume(tmp_path / "run", overrides).run()["steps"] == 3  # it is the second without a higher one


def test_a_reward_function_that_fails_in_an_evaluation_loses_nothing(scripted, tmp_path):
    with pytest.raises(RewardError, match=r"(?s)score raised KeyError.*saved at step 2; go on with"):
        trained(scripted([0, 3, None], steps=3), tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2]
    scripted([5, 5], steps=3)
    assert Trainer.resume(tmp_path / "run").run()["steps"] == 3
    assert accuracies(tmp_path / "run") == {0: 0, 1: 3 / 8, 3: 5 / 8}


@pytest.mark.parametrize(
    ("task", "train", "message"),
    [
        ({"eval_steps": 2, "eval_n": 0}, {}, "eval_steps = 2 and eval_n = 0: there is nothing to evaluate on"),
        ({"eval_samples": 2, "eval_n": 0}, {}, "eval_samples = 2 and eval_n = 0"),
        ({"eval_steps": -1}, {}, "eval_steps = -1: must not be negative"),
        ({"eval_patience": 2}, {}, "eval_patience = 2 counts evaluations during training: set eval_steps"),
        ({"eval_patience": 2, "eval_steps": 1}, {"best_metric": "reward/mean"}, "best_metric = 'reward/mean' is of no"),
        ({"eval_sets": {"a/b": {}}}, {}, "'a/b' is part of a metric's name"),
        ({"eval_sets": {"hard": {"n": 0}}}, {}, "n = 0: must be at least 1"),
    ],
)
def test_options_that_contradict_each_other(tree, task, train, message):
    tree["task"] |= task
    tree["train"] |= train
    with pytest.raises(ConfigError, match=message):
        build_config(tree)


def test_a_metric_that_no_evaluation_has_is_refused_before_training(tree, tmp_path):
    tree["task"]["eval_steps"] = 2
    tree["train"]["best_metric"] = "eval/acuracy"
    with pytest.raises(ConfigError, match=r"best_metric = 'eval/acuracy'.*did you mean eval/accuracy"):
        trained(tree, tmp_path / "run")
    assert rows(tmp_path / "run") == []
