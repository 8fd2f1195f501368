"""Faults planted in a copy of the scoring kernel: each is caught. A patch that no longer applies fails too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from simulated import HERE, ROOT
from test_faults import FLAGS, compile_object

# Each fault, and how the probe finds it.
FAULTS = {
    "missing-wait": "wrong numbers", "wrong-stage": "wrong numbers", "missing-barrier": "wrong numbers",
    "wrong-fragment-layout": "wrong numbers", "no-swizzle": "bank conflicts",
}  # fmt: skip


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    into = tmp_path_factory.mktemp("harness")
    return [
        compile_object(HERE / f"{n}.cpp", ROOT, into) for n in ("simulator", "simulated_tensor_core", "probe_score")
    ]


def probe(root: Path, harness: list[Path], into: Path) -> subprocess.CompletedProcess:
    kernel = compile_object(root / "csrc" / "cuda" / "score.cu", root, into)
    subprocess.run(["g++", *FLAGS, *harness, kernel, "-o", into / "probe"], check=True)
    return subprocess.run([into / "probe"], capture_output=True, text=True, timeout=300, check=False)


def test_the_kernel_itself_passes(harness, tmp_path):
    done = probe(ROOT, harness, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_patch_is_planted():
    assert sorted(f.stem for f in (ROOT / "tests" / "faults").glob("score-*")) == sorted(f"score-{f}" for f in FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, harness, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    command = ["patch", "-p1", "--fuzz=0", "-i", ROOT / "tests" / "faults" / f"score-{fault}.patch"]
    applied = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, f"the patch no longer applies: {applied.stdout}"
    done = probe(tmp_path, harness, tmp_path)
    assert done.returncode == 1, "nobody noticed" if done.returncode == 0 else done.stderr
    assert FAULTS[fault] in done.stdout
