"""However a run ends, what is whole is saved, and whoever reads is told."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from longgrpo.config.run import build_config
from longgrpo.errors import TrainingError, UserError
from longgrpo.run import building, checkpoint, files, tracking
from longgrpo.run import trainer as train_module
from longgrpo.run.trainer import Trainer
from longgrpo.train import loop
from testing.commands import train_command, write_config
from testing.full_disk import limited_file_size


@pytest.fixture
def quick(tree):
    tree["train"] |= {"steps": 3, "probe_prompts": 0, "save_steps": 0}
    tree["task"]["eval_n"] = 0
    return tree


def saved_steps(run):
    return [path.name for path in checkpoint.checkpoints(run)]


def weights(run):
    return load_file(checkpoint.checkpoints(run)[-1] / "state.safetensors")


def failing(monkeypatch, name, at, error):
    """A phase of the step raises in its n-th call."""
    phase, calls = getattr(loop, name), iter(range(1, 1000))

    def call(*arguments):
        if next(calls) == at:
            raise error
        return phase(*arguments)

    monkeypatch.setattr(loop, name, call)


ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), TrainingError, "out of memory: CUDA"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), TrainingError, "lower train.token_budget"),
    (RuntimeError("std::bad_alloc"), TrainingError, "lower train.token_budget"),
    (MemoryError(), TrainingError, "out of memory"),
    (SystemExit(0), TrainingError, r"sys\.exit\(0\) was called in the run's process"),
    (KeyError("a fault of ours"), KeyError, "a fault of ours"),
    (ZeroDivisionError("division"), ZeroDivisionError, "division"),
]


@pytest.mark.parametrize(("error", "kind", "message"), ERRORS)
def test_any_error_in_a_step_saves_the_state_before_it(quick, tmp_path, monkeypatch, capfd, error, kind, message):
    Trainer(build_config(quick), tmp_path / "whole").run()
    failing(monkeypatch, "score", 3, error)
    with pytest.raises(kind, match=message) as raised:
        Trainer(build_config(quick), tmp_path / "run").run()
    assert "saved at step 2; go on with: longgrpo train --resume" in str(raised.value) + capfd.readouterr().err
    assert saved_steps(tmp_path / "run") == ["step-000002"]
    monkeypatch.undo()
    assert Trainer.resume(tmp_path / "run").run()["steps"] == 3
    whole, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.items())


def test_after_the_weights_have_moved_nothing_is_saved_and_it_is_said(quick, tmp_path, monkeypatch):
    quick["train"]["save_steps"] = 1
    failing(monkeypatch, "sync_weights", 2, MemoryError())
    with pytest.raises(TrainingError, match=r"not saved \(the weights have moved on.*last checkpoint is step-000001"):
        Trainer(build_config(quick), tmp_path / "run").run()
    assert saved_steps(tmp_path / "run") == ["step-000001"]


def test_a_save_that_fails_as_well_is_told(quick, tmp_path, monkeypatch):
    failing(monkeypatch, "score", 2, MemoryError())
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(TrainingError, match=r"(?s)out of memory.*not saved \(UserError: .*No space left on device"):
        Trainer(build_config(quick), tmp_path / "run").run()


class Exits(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            sys.exit(0)


def test_a_callback_that_exits_does_not_end_the_run_as_if_it_were_done(quick, tmp_path):
    with pytest.raises(TrainingError, match=r"sys\.exit\(0\) was called"):
        Trainer(build_config(quick), tmp_path / "run", callbacks=[Exits]).run()


class Breaks:
    def __init__(self, *_):
        self.written = 0

    def write(self, step, numbers):
        self.written += 1
        if self.written == 2:
            raise OSError("No space left on device")

    def table(self, *_):
        pass

    def note(self, *_):
        raise AssertionError

    def close(self):
        raise AssertionError("it is left out by then")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(quick, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tracking, "_sink", Breaks)
    assert Trainer(build_config(quick), tmp_path / "run").run()["steps"] == 3
    told = [line for line in capfd.readouterr().err.splitlines() if "log.to" in line]
    assert told == [
        "warning: log.to: tensorboard failed (OSError: No space left on device); the run goes on without it"
    ]


@pytest.fixture
def config_file(quick, tmp_path):
    return write_config(quick, tmp_path / "tiny.yaml")


def test_a_terminal_that_closes_loses_nothing(config_file, tmp_path):
    """SIGHUP, and nobody reads stderr any more: what a closed connection does."""
    run = tmp_path / "run"
    arguments = train_command(config_file, "--output_dir", run, "--train.steps", "100000")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 3/"):
            break
    process.stderr.close()
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=400) == 128 + signal.SIGHUP
    assert len(saved_steps(run)) == 1


def test_a_reader_that_has_gone_does_not_end_the_run(config_file, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        train_command(config_file, "--output_dir", run), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stderr.close()  # as `| head` does
    process.stdout.close()
    assert process.wait(timeout=400) in (0, 128 + signal.SIGPIPE)
    assert json.loads((run / "summary.json").read_text())["steps"] == 3


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train_module.StopRequest(print) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- what belongs together


def test_a_run_that_goes_on_has_no_summary(quick, tmp_path, monkeypatch):
    Trainer(build_config(quick), tmp_path / "run").run()
    failing(monkeypatch, "score", 1, MemoryError())
    with pytest.raises(TrainingError):
        Trainer.resume(tmp_path / "run", ["--train.steps", "9"]).run()
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("lora", [True, False])
def test_what_stands_at_the_top_is_of_the_newest_saved_step_or_is_not_there(quick, tmp_path, monkeypatch, lora):
    quick["task"]["eval_n"], quick["train"]["steps"], quick["train"]["save_steps"] = 4, 1, 1
    weights = "adapter" if lora else "model"
    if not lora:
        del quick["lora"]
    ends = {weights, "summary.json", "eval_after.json"}
    run, top = tmp_path / "run", lambda: ends & set(os.listdir(tmp_path / "run"))
    Trainer(build_config(quick), run).run()
    assert top() == ends
    (run / "eval_after_mine.json").write_text("not ours")

    with monkeypatch.context() as patch:  # nothing is saved: the weights and the evaluation are still the newest
        failing(patch, "score", 1, MemoryError())
        with pytest.raises(TrainingError):
            Trainer.resume(run, ["--train.steps", "9"]).run()
    assert saved_steps(run) == ["step-000001"]
    assert top() == ends - {"summary.json"}

    resumed = Trainer.resume(run, ["--train.steps", "9"])
    monkeypatch.setattr(train_module.Watched, "step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert resumed.run() is None
    assert saved_steps(run)[-1] == "step-000002"
    assert top() == set()
    monkeypatch.undo()

    Trainer.resume(run, ["--train.steps", "3"]).run()
    assert top() == ends
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert (run / "eval_after_mine.json").read_text() == "not ours"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--task.eval_seed", "7"], r"eval_before\.json: was made with other problems than task\.eval_n, eval_seed"),
        (["--task.eval_n", "5"], r"eval_before\.json: was made with other problems"),
        (
            ["--task.eval_reward", "exact_answer"],
            "was scored by 'score_answer', and task.eval_reward is 'exact_answer'",
        ),
    ],
)
def test_another_evaluation_is_refused_before_the_engine_is_built(quick, tmp_path, monkeypatch, overrides, message):
    quick["task"]["eval_n"], quick["train"]["steps"] = 4, 1
    Trainer(build_config(quick), tmp_path / "run").run()
    (tmp_path / "run/summary.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(building, "make_engine", lambda *_: pytest.fail("the engine was built"))
        with pytest.raises(UserError, match=message):
            Trainer.resume(tmp_path / "run", ["--train.steps", "2", *overrides])
    (tmp_path / "run/eval_before.json").unlink()
    summary = Trainer.resume(tmp_path / "run", ["--train.steps", "2", *overrides]).run()
    assert "eval_diff" not in summary
    assert "eval_after" in summary


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "empty eval_before.json": ("eval_before.json", lambda path: path.write_text("")),
    "eval_before.json of another shape": ("eval_before.json", lambda path: path.write_text('{"questions": 3}')),
    "damaged state.json": ("checkpoints/step-000002/state.json", lambda path: path.write_text("{")),
    "a bit of state.safetensors": ("checkpoints/step-000002/state.safetensors", flip),
    "no state.safetensors": ("checkpoints/step-000002/state.safetensors", lambda path: path.unlink()),
    "config.yaml": ("config.yaml", lambda path: path.write_bytes(b"\xff\x00")),
}


@pytest.fixture(scope="module")
def whole_run(base_tree, tmp_path_factory):
    tree = copy.deepcopy(base_tree)
    tree["train"] |= {"steps": 2, "probe_prompts": 0, "save_steps": 1}
    tree["task"]["eval_n"] = 2
    run = tmp_path_factory.mktemp("whole") / "run"
    Trainer(build_config(tree), run).run()
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_before_the_engine_is_built(whole_run, tmp_path, monkeypatch, damage):
    run = shutil.copytree(whole_run, tmp_path / "run")
    name, do = DAMAGES[damage]
    do(run / name)
    monkeypatch.setattr(building, "make_engine", lambda *_: pytest.fail("the engine was built"))
    with pytest.raises(UserError, match=str(run / name).rpartition("/")[0]) as raised:
        Trainer.resume(run, ["--train.steps", "3"])
    if "checkpoints" in name:
        assert (
            f"mv {run}/checkpoints/step-000002 {run}/checkpoints/step-000002.damaged (then step-000001 is the last"
            in (str(raised.value))
        )
        os.rename(run / "checkpoints/step-000002", run / "checkpoints/step-000002.damaged")
        monkeypatch.undo()
        assert Trainer.resume(run, ["--train.steps", "3"]).progress.step == 1


def test_an_older_checkpoint_that_is_damaged_stops_no_save(whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    (run / "checkpoints/step-000001/state.json").write_text("")
    assert Trainer.resume(run, ["--train.steps", "3", "--train.keep_checkpoints", "3"]).run()["steps"] == 3


@pytest.mark.parametrize("tail", [b"\0" * 500, b'\0\0{"step": 9}\n', b"\xff\xfe\n", b'{"step": "2"}\n', b"[1]\n"])
def test_garbage_at_the_end_of_the_metrics_is_dropped(whole_run, tmp_path, tail):
    run = shutil.copytree(whole_run, tmp_path / "run")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    Trainer.resume(run, ["--train.steps", "3"]).run()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


def test_a_checkpoint_is_verified_before_anything_is_changed(tmp_path):
    parameters = {"a": torch.nn.Parameter(torch.zeros(3)), "b": torch.nn.Parameter(torch.zeros(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = checkpoint.save(tmp_path, 1, parameters, optimizer, {}, None, 2)
    sums = subprocess.run(["sha256sum", "-c", checkpoint.SUMS], cwd=saved, capture_output=True, text=True, check=False)
    assert sums.returncode == 0, sums.stderr
    tensors = load_file(saved / "state.safetensors")
    del tensors["exp_avg.b"]
    checkpoint.save_file(tensors, saved / "state.safetensors")
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with pytest.raises(UserError, match=r"state\.safetensors is not as it was saved"):
        checkpoint.load(saved, parameters, optimizer)
    (saved / checkpoint.SUMS).unlink()  # as one that was saved before there were checksums
    with pytest.raises(UserError, match=r"the optimizer's exp_avg\.b is missing"):
        checkpoint.load(saved, parameters, optimizer)
    wider = {"a": parameters["a"], "b": torch.nn.Parameter(torch.ones(5))}
    with torch.no_grad():
        parameters["a"] += 1
    with pytest.raises(UserError):
        checkpoint.load_weights(saved, load_file(saved / "state.safetensors"), wider)
    assert torch.equal(parameters["a"], before["a"] + 1)  # the first fits, and is as it was


def test_a_directory_is_written_by_one(tmp_path):
    def write(path):
        (path / "file").write_text("one")
        with pytest.raises(UserError, match="another process is writing it"):
            files.replace_directory(tmp_path / "out", lambda other: None, new=True)

    files.replace_directory(tmp_path / "out", write, new=True)
    assert (tmp_path / "out/file").read_text() == "one"
    with pytest.raises(UserError, match="exists already"):
        files.replace_directory(tmp_path / "out", write, new=True)


def test_a_full_disk_leaves_the_mark_of_what_was_made(quick, tmp_path):
    with limited_file_size(1500), pytest.raises(UserError, match="cannot be written"):
        Trainer(build_config(quick), tmp_path / "run")
    assert Trainer(build_config(quick), tmp_path / "run").run()["steps"] == 3
