"""Every disease, given to a tiny run, is named; healthy tiny runs are not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from longgrpo.config.watch import WatchConfig
from testing import ROOT
from testing.diseases import DISEASES, HEALTHY, Disease, give


def steps_of(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]


def test_every_finding_is_given():
    assert set(DISEASES) == set(WatchConfig().findings)


@pytest.mark.parametrize("name", list(DISEASES))
def test_a_disease_is_named_within_ten_steps_of_its_beginning(name, tiny_model, tmp_path):
    give(DISEASES[name], tiny_model, tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    begun = next(step["step"] for step in steps if DISEASES[name].begun(step))
    named = [step["step"] for step in steps for key in step if key.startswith(f"watch/{name}") and step[key] == 1]
    assert named
    assert named[0] < begun + 10


@pytest.mark.long
@pytest.mark.parametrize("name", list(HEALTHY))
def test_a_healthy_run_of_a_hundred_steps_has_no_finding(name, tiny_model, tmp_path):
    give(Disease(HEALTHY[name]), tiny_model, tmp_path / "run", train={"steps": 100})
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 100
    assert [key for step in steps for key in step if key.startswith("watch/")] == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_diseased_example_is_caught_before_step_10(tmp_path):
    """SmolLM2 in vLLM, as a user runs it."""
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "longgrpo.cli", "train", ROOT / "examples/diseased.yaml", "--train.steps", "9"]
    command += ["--task.eval_prefill", "null", "--train.probe_prompts", "0", "--rollout.engine", "vllm"]
    done = subprocess.run(
        [*map(str, command), "--output_dir", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    named = {key for step in steps_of(tmp_path / "run") for key in step if key.startswith("watch/") and step[key] == 1}
    assert {"watch/truncated", "watch/constant_reward/exact_answer"} <= named
    for name in ("truncated", "constant_reward"):
        assert f": {name}: " in done.stderr
