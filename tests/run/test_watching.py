"""The watch beside a run: where a finding is told, how it ends a run, and that a resumed one goes on where it was."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longgrpo.config.run import build_config
from longgrpo.errors import TrainingError
from longgrpo.report import read_run, write_report
from longgrpo.run.trainer import Trainer
from longgrpo.tasks.builtin_rewards import BUILT_IN, HIGHEST
from testing import OWN_REWARDS

FINDING = "watch/constant_reward/constant"


@pytest.fixture
def tree(tree):
    """A second reward that never differs is named after three steps; nothing else is looked for."""
    tree["task"]["eval_n"] = 0
    tree["rewards"].append({"function": f"{OWN_REWARDS}:constant", "weight": 0.1})
    tree["train"] |= {"steps": 5, "probe_prompts": 0}
    names = ("truncated", "length_drift", "unrelated_reward", "entropy_collapse", "no_spread", "identical_replies")
    tree["watch"] = {"constant_reward": {"steps": 3}, **dict.fromkeys(names)}
    return tree


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def timeless(rows):
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per", "peak_", "meas"))} for row in rows
    ]


def test_a_finding_is_told_once_where_a_run_is_read(tree, tmp_path, capfd):
    summary = Trainer(build_config(tree), tmp_path / "run").run()
    assert summary["findings"] == ["constant_reward"]
    assert [(row["step"], row[FINDING]) for row in rows_of(tmp_path / "run") if FINDING in row] == [(3, 1.0)]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("watch, ")]
    assert len(told) == 1
    assert told[0].startswith(
        "watch, step 3: constant_reward: constant has given 0.1 to every completion of the last 3"
    )
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars(FINDING)] == [(3, 1.0)]
    (text,) = events.Tensors(f"{FINDING}/text_summary")
    assert text.step == 3
    assert text.tensor_proto.string_val[0].decode() == told[0]
    (found,) = read_run(tmp_path / "run").findings
    assert (found.name, found.subject, found.begin, found.end) == ("constant_reward", "constant", 3, None)
    write_report([read_run(tmp_path / "run")], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("from step 3, not ended") == 1
    assert page.count("step 3: constant_reward begins") == 1  # in one chart


def test_a_run_that_stops_on_a_finding_is_saved_resumed_and_the_same(tree, tmp_path):
    Trainer(build_config(tree), tmp_path / "whole").run()
    tree["watch"]["stop_on"] = ["constant_reward"]
    with pytest.raises(TrainingError) as ended:
        Trainer(build_config(tree), tmp_path / "run").run()
    assert "watch.stop_on names constant_reward\nsaved at step 3; go on with: longgrpo train --resume" in str(
        ended.value
    )
    assert (tmp_path / "run/checkpoints/step-000003").is_dir()
    assert [row["step"] for row in rows_of(tmp_path / "run")][-1] == 3
    resumed = Trainer.resume(tmp_path / "run")
    summary = resumed.run()
    assert summary["findings"] == ["constant_reward"]
    assert timeless(rows_of(tmp_path / "run")) == timeless(rows_of(tmp_path / "whole"))


def test_the_highest_value_of_each_built_in_reward_is_known():
    assert set(HIGHEST) == set(BUILT_IN)
