"""What a run leaves of itself: metrics, completions, TensorBoard, wandb; and what it shows."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import sys
import types

import pyarrow.parquet
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.run.trainer import Trainer
from testing import OWN_REWARDS


@pytest.fixture
def tree(tree):
    tree["task"]["eval_n"] = 0
    tree["rewards"] += [{"function": f"{OWN_REWARDS}:logs_mixed", "weight": 0}]
    return tree


def run(tree, directory):
    Trainer(build_config(tree), directory).run()
    return directory


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def completions_of(directory):
    return pyarrow.parquet.read_table(directory / "completions").to_pylist()


def test_completions_have_every_reward_the_advantage_and_extra_columns(tree, tmp_path):
    directory = run(tree, tmp_path / "run")
    rows = completions_of(directory)
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3, 4) for _ in range(12)]
    for step in metrics_of(directory)[1:]:
        of_step = [row for row in rows if row["step"] == step["step"]]
        rewards = [row["reward/digits"] for row in of_step]
        assert sum(rewards) / 12 == pytest.approx(step["reward/digits/mean"])
        assert sum(row["tokens"] for row in of_step) == step["completion_length/sum"]
        assert step["share_of_long"] == 0.5
        for group in range(3):
            of_group = of_step[4 * group : 4 * group + 4]
            assert sum(row["advantage"] for row in of_group) == pytest.approx(0, abs=1e-4)
            assert len({row["question"] for row in of_group}) == 1
    assert rows[0]["reward/logs_mixed"] is None
    assert {row["extra/mixed"] for row in rows} == {"1", "one"}
    for row in rows:
        letters = row["completion"]
        assert row["reward/digits"] == pytest.approx(sum(c.isdigit() for c in letters) / 10 + len(letters) / 100)


def test_a_resumed_run_writes_its_later_steps_anew(tree, tmp_path):
    tree["train"]["steps"] = 2
    directory = run(tree, tmp_path / "run")
    pyarrow.parquet.write_table(pyarrow.table({"step": [3]}), directory / "completions/step-000003.parquet")
    tree["train"]["steps"] = 4
    trainer = Trainer.resume(directory, ["--train.steps", "2"])
    trainer.run()
    assert sorted(path.name for path in (directory / "completions").iterdir()) == [
        "step-000001.parquet",
        "step-000002.parquet",
    ]


def test_few_or_no_completions(tree, tmp_path):
    tree["train"]["steps"] = 1
    tree["log"] = {"completions": 5}
    assert len(completions_of(run(tree, tmp_path / "few"))) == 5
    tree["log"] = {"completions": 0}
    assert not (run(tree, tmp_path / "none") / "completions").exists()


def test_tensorboard_has_what_metrics_jsonl_has(tree, tmp_path):
    directory = run(tree, tmp_path / "run")
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    lines = metrics_of(directory)
    names = {name for line in lines for name, value in line.items() if value is not None and name != "step"}
    assert set(events.Tags()["scalars"]) == names
    for name in ("reward/mean", "loss", "grad_norm", "seconds/roll_out"):
        scalars = {event.step: event.value for event in events.Scalars(name)}
        assert scalars == {line["step"]: pytest.approx(line[name], rel=1e-6) for line in lines[1:]}


def test_no_trackers(tree, tmp_path):
    tree["log"] = {"to": []}
    tree["train"]["steps"] = 1
    assert not (run(tree, tmp_path / "run") / "tensorboard").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_that_is_asked_for(tree, tmp_path, name, monkeypatch):
    tree["log"] = {"to": [name], "project": "ours"}
    tree["train"]["steps"] = 2
    if importlib.util.find_spec(name) is None:
        with pytest.raises(ConfigError, match=f"log.to names {name}, which is not installed: pip install {name}"):
            Trainer(build_config(tree), tmp_path / "run")
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    directory = run(tree, tmp_path / "run")
    written = list(
        (directory if name == "wandb" else tmp_path / "trackio").rglob("*.wandb" if name == "wandb" else "*.db")
    )
    assert any(b"reward/mean" in path.read_bytes() for path in written)


class Service(types.ModuleType):
    """What a run asks of wandb or trackio."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.begun, self.logged = [], []

    def init(self, **options):
        self.begun.append(options)
        return self

    def Table(self, columns, data):
        return {"columns": columns, "data": data}

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        pass


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    made = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    return made


def test_a_service_gets_the_completions_as_a_table(tree, tmp_path, service):
    tree["log"], tree["train"]["steps"] = {"to": [service.__name__], "completions": 5}, 2
    rows = completions_of(run(tree, tmp_path / "run"))
    tables = {step: values["completions"] for step, values in service.logged if "completions" in values}
    assert sorted(tables) == [1, 2]
    for step, table in tables.items():
        of_step = [row for row in rows if row["step"] == step]
        assert len(table["data"]) == len(of_step) == 5
        assert [dict(zip(table["columns"], row, strict=True))["advantage"] for row in table["data"]] == [
            row["advantage"] for row in of_step
        ]


def test_a_run_has_an_id_of_its_own(tree, tmp_path, service):
    """Of two runs in directories of one name neither goes on with the other's; a resumed one goes on with its own."""
    tree["log"], tree["train"]["steps"] = {"to": [service.__name__]}, 1
    run(tree, tmp_path / "here" / "run")
    run(tree, tmp_path / "there" / "run")
    Trainer.resume(tmp_path / "here" / "run", ["--train.steps", "2"]).run()
    first, other, again = ([options[key] for key in ("id", "name") if key in options] for options in service.begun)
    assert first == again
    assert first[0] != other[0]
    assert all("run" in names[-1] for names in (first, other))


def test_what_is_shown(tree, tmp_path, capfd):
    run(tree, tmp_path / "run")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    shown = re.compile(
        r"step \d/4  reward \d\.\d{3}  digits \d\.\d{3}  logs_mixed -  length \d\.\d  "
        r"\d+\.\d s \(rollout \d+\.\d, rewards \d+\.\d, training \d+\.\d\)  \d+ tokens/s  0:00:\d\d left"
    )
    assert all(shown.fullmatch(line) for line in lines)
    assert lines[-1].endswith("0:00:00 left")


def test_values_that_a_table_does_not_hold_are_text(tree, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "def odd(completions, log_extra, **columns):\n"
        "    log_extra('large', [2**70] * len(completions))\n"
        "    log_extra('half', ['\\ud800'] * len(completions))\n"
        "    return [float(i % 2) for i in range(len(completions))]\n"
    )
    tree["rewards"], tree["train"]["steps"] = [{"function": f"{own}:odd"}], 1
    tree["train"]["probe_prompts"] = 0
    row = completions_of(run(tree, tmp_path / "run"))[0]
    assert row["extra/large"] == str(2**70)
    assert row["extra/half"] == "\\ud800"
