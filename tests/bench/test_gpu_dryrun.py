"""`make gpu` where there is no GPU: what it says at once, and every stage's Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu_dryrun
import pytest

import gpu
from testing import ROOT


def make_gpu(*arguments, path=""):
    command = [sys.executable, str(ROOT / "bench/gpu.py"), *map(str, arguments)]
    environment = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def card(tmp_path, monkeypatch):
    """An nvidia-smi that knows a card, and a stage of each outcome."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\ncase $1 in *name*) echo NVIDIA Test;; *driver*) echo 580.1;; *) echo 9.0;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "UNPACKED", tmp_path / "wheels")

    def stage(code, **options):
        return gpu.Stage((), (), lambda results: [gpu.python("-c", code)], **options)

    stages = {
        "good": stage("print('3 passed')"),
        "bad": stage("print('1 failed'); raise SystemExit(3)"),
        "slow": stage("import time; print('begun', flush=True); time.sleep(60)"),
        "bare": gpu.Stage(("no-such-tool",), ("no_such_module",), lambda results: []),
        "apart": stage("import apart; print(apart.__name__)", optional="apart"),
    }
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.chdir(ROOT)
    return tmp_path / "results"


def outcome(capsys, results, *arguments):
    code = gpu.main([*arguments, "--results", str(results)])
    out = capsys.readouterr()
    stages = [json.loads(line) for line in (results / "stages.jsonl").read_text().splitlines()]
    return code, out, stages


def test_without_a_gpu_it_says_so_at_once(tmp_path):
    start = time.monotonic()
    done = make_gpu("build")
    if "no nvidia-smi" not in done.stderr:
        pytest.skip("there is a GPU")
    assert done.returncode == 2
    assert time.monotonic() - start < 30  # torch alone takes seconds to import on a busy machine


def test_train_is_about_vllm():
    """Without its wheel the stage is skipped, as `apart` below."""
    assert [name for name, stage in gpu.STAGES.items() if stage.optional] == ["train"]
    assert gpu.STAGES["train"].optional == "vllm"


def test_an_unknown_stage_is_named():
    done = make_gpu("biuld")
    assert done.returncode == 2
    assert "no stage biuld" in done.stderr
    assert "build test sanitize bench peers step autotune train" in done.stderr


def test_a_stage_ends_with_one_line_and_the_record_grows(card, capsys):
    code, out, stages = outcome(capsys, card, "good", "bad")
    assert code == 1
    lines = [line for line in out.out.splitlines() if line.startswith("==>") and ":" in line]
    assert lines[0].startswith("==> good: passed, ")
    assert lines[0].endswith(" s: 3 passed")
    assert lines[1].startswith("==> bad: failed, ")
    assert [stage["status"] for stage in stages] == ["passed", "failed"]
    record = json.loads((card / "record.json").read_text())
    assert (record["card"], record["driver"]) == ("NVIDIA Test", "580.1")
    assert record["stages"] == stages
    assert record["torch"]
    assert "3 passed" in (card / "good.log").read_text()


def test_what_is_missing_is_said_first(card, capsys):
    code, out, stages = outcome(capsys, card, "good", "bare")
    assert code == 1
    assert "bare cannot run here: no no-such-tool on PATH" in out.err
    assert "has no no_such_module" in out.err
    assert [stage["status"] for stage in stages] == ["passed", "failed"]


def test_a_stage_is_stopped_when_its_time_is_over(card, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS", 3)
    code, _, stages = outcome(capsys, card, "slow")
    assert code == 1
    assert stages[0]["last"] == "stopped after 3 seconds; before that: begun"


def test_a_wheel_of_the_folder_is_on_the_path(card, capsys, tmp_path):
    code, out, _ = outcome(capsys, card, "apart")
    assert code == 0
    assert "==> apart: skipped: no apart wheel" in out.out
    wheels = tmp_path / "folder"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "apart-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("apart/__init__.py", "")
    code, out, stages = outcome(capsys, card, "apart", "--wheels", str(wheels))
    assert code == 0
    assert stages[-1]["last"] == "apart"


@pytest.mark.parametrize("stage", gpu_dryrun.STAGES)
def test_each_stage_runs_dry(stage):
    if stage in ("step", "train"):
        pytest.importorskip("peft")
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/gpu_dryrun.py"), stage], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{stage}: ")


def test_every_stage_is_in_the_dry_run():
    assert list(gpu_dryrun.STAGES) == list(gpu.STAGES)
    assert Path(gpu.__file__).parent == ROOT / "bench"
