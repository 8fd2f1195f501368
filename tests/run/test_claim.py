"""A run writes only over what it made, and one process works on it at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.run import building
from longgrpo.run.claim import MARK, Claim, claim_new
from longgrpo.run.trainer import Trainer


@pytest.fixture
def quick(tree):
    tree["train"] |= {"steps": 1, "probe_prompts": 0}
    tree["task"]["eval_n"] = 0
    return tree


@pytest.fixture
def no_engine(monkeypatch):
    """Whatever is refused is refused before the engine is built."""
    monkeypatch.setattr(building, "make_engine", lambda *_: pytest.fail("the engine was built"))


def content(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


FOREIGN = ("model/weights", "metrics.jsonl", "summary.json", "config.yaml", "completions/mine", "checkpoints/mine",
           "tensorboard/mine", "evaluations/mine", "eval_before.json", "eval_after.json")  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_run_would_write_over_is_refused_before_the_engine_is_built(tree, tmp_path, no_engine, name):
    del tree["lora"]
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = content(tmp_path / "mine")
    with pytest.raises(ConfigError, match=rf"{name.split('/')[0]} exists, this run has not made it.*move it away"):
        Trainer(build_config(tree), tmp_path / "mine")
    assert content(tmp_path / "mine") == before
    assert not (tmp_path / "mine" / MARK).exists()


def test_a_base_model_beside_the_config_is_not_overwritten(quick, tmp_path, tiny_model, monkeypatch):
    """model.path: model, --output_dir ."""
    shutil.copytree(tiny_model, tmp_path / "model")
    before = content(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    quick["model"]["path"] = str(tmp_path / "model")
    full = {key: value for key, value in quick.items() if key != "lora"}
    with pytest.raises(ConfigError, match="model exists, this run has not made it"):
        Trainer(build_config(full | {"output_dir": "."}))
    Trainer(build_config(quick | {"output_dir": "."})).run()  # an adapter is written, and the model left alone
    assert content(tmp_path / "model") == before
    assert (tmp_path / "adapter").is_dir()


def test_other_files_are_left_alone(quick, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    Trainer(build_config(quick), tmp_path / "run").run()
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_what_appears_while_the_run_goes_on_is_not_overwritten_at_its_end(quick, tmp_path):
    trainer = Trainer(build_config(quick), tmp_path / "run")
    (tmp_path / "run/adapter").mkdir()
    (tmp_path / "run/adapter/mine").write_text("mine")
    with pytest.raises(ConfigError, match=r"(?s)adapter exists, this run has not made it.*saved at step 1; go on with"):
        trainer.run()
    assert (tmp_path / "run/adapter/mine").read_text() == "mine"
    with pytest.raises(ConfigError, match="adapter exists"):
        Trainer.resume(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    assert Trainer.resume(tmp_path / "run").run()["steps"] == 1


def test_a_run_from_before_the_mark_is_resumed(quick, tmp_path):
    Trainer(build_config(quick), tmp_path / "run").run()
    (tmp_path / "run" / MARK).unlink()
    (tmp_path / "run/checkpoints/step-000001/SHA256SUMS").unlink()
    with pytest.raises(ConfigError, match="holds a run already: resume it"):
        Trainer(build_config(quick), tmp_path / "run")
    assert Trainer.resume(tmp_path / "run", ["--train.steps", "2"]).run()["steps"] == 2


def test_a_run_from_before_the_mark_does_not_own_the_model_that_it_reads(quick, tmp_path, tiny_model):
    del quick["lora"]
    run = tmp_path / "run"
    Trainer(build_config(quick), run).run()
    (run / MARK).unlink()
    before = content(run / "model")
    with pytest.raises(ConfigError, match="model exists, this run has not made it"):
        Trainer.resume(run, ["--model.path", str(run / "model"), "--train.steps", "2"])
    assert content(run / "model") == before


def test_a_config_called_config_yaml_is_no_run(quick, tmp_path, no_engine):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(quick))
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.yaml exists, this run has not made it"):
        Trainer.resume(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.yaml exists, this run has not made it"):
        Trainer(build_config(quick), tmp_path)
    assert content(tmp_path) == before


def test_a_directory_that_cannot_be_written_is_refused_before_the_engine_is_built(quick, tmp_path, no_engine):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file/below", Path("/proc/no")):
        with pytest.raises(ConfigError, match=f"{directory}: no run can be written there"):
            Trainer(build_config(quick), directory)


def test_a_run_that_was_refused_leaves_nothing(tree, tmp_path):
    tree["task"]["name"] = "no_such_task"
    with pytest.raises(Exception, match="no_such_task"):
        Trainer(build_config(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- one at a time


def test_a_second_process_is_told(tmp_path):
    claim = Claim(tmp_path / "run")
    code = f"from longgrpo.run.claim import Claim; from pathlib import Path; Claim(Path({str(tmp_path / 'run')!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process works on this run" in done.stderr
    with pytest.raises(ConfigError, match="another Trainer of this process"):
        Claim(tmp_path / "run")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 1
    claim.close()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def _hold(directory, ready, forks):
    claim = Claim(directory)  # noqa: F841 - held until the process ends
    if forks and os.fork() == 0:
        signal.pause()  # a child that lives on
    ready.send(True)
    signal.pause()


@pytest.mark.parametrize("forks", [False, True])
def test_a_lock_ends_with_its_process(tmp_path, forks):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(tmp_path / "run", theirs, forks))
    process.start()
    ours.recv()
    with pytest.raises(ConfigError, match="another process works on this run"):
        Claim(tmp_path / "run")
    process.kill()
    process.join()
    Claim(tmp_path / "run").close()


def _name(parent, barrier, results):
    barrier.wait()
    claim = claim_new(parent, "tiny")
    results.put(claim.directory.name)
    barrier.wait()


def test_names_are_given_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_name, args=(tmp_path, barrier, results)) for _ in range(8)]
    for process in processes:
        process.start()
    names = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert names == {"tiny", *(f"tiny-{n}" for n in range(2, 9))}


def test_half_a_line_of_the_mark_counts_for_nothing(tmp_path):
    claim = Claim(tmp_path)
    claim.add(["config.yaml"])
    claim.close()
    with (tmp_path / MARK).open("a") as mark:
        mark.write("summary.jso")
    assert Claim(tmp_path).made == {"config.yaml"}


# ---- what is there besides


def test_what_is_not_a_runs_is_ignored(quick, tmp_path):
    quick["train"] |= {"steps": 2, "save_steps": 1, "best_metric": "reward/mean"}
    quick["task"] |= {"eval_n": 4, "eval_steps": 1}
    run = tmp_path / "run"
    Trainer(build_config(quick), run).run()
    shutil.copytree(run / "checkpoints/step-000002", run / "checkpoints/step-000002.bak")
    others = [
        run / name / file
        for name in ("checkpoints", "completions", "evaluations", "")
        for file in (".DS_Store", ".nfs0001", "notes.parquet", "step-x.parquet", "step-x.json", "step-99", "step-.json")
    ]
    for path in others:
        path.write_text("not ours")
    (run / "checkpoints/.nfs0002").mkdir()
    summary = Trainer.resume(run, ["--train.steps", "4"]).run()
    assert summary["steps"] == 4
    assert all(path.read_text() == "not ours" for path in others)
    assert (run / "checkpoints/step-000002.bak/state.json").exists()
    from longgrpo import cli

    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--as", "adapter", "--checkpoint", "best"]) == 0


def test_a_checkpoint_that_is_moved_away_is_gone(quick, tmp_path):
    quick["train"] |= {"steps": 2, "save_steps": 1}
    run = tmp_path / "run"
    Trainer(build_config(quick), run).run()
    os.rename(run / "checkpoints/step-000002", run / "checkpoints/step-000002.damaged")
    assert Trainer.resume(run).progress.step == 1
    assert json.loads((run / "summary.json").read_text())["steps"] == 2  # until it is trained on
