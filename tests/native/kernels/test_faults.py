"""Faults planted in a copy of the kernels: each is caught. A patch that no longer applies fails too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from simulated import HERE, ROOT

FAULTS = sorted((ROOT / "tests" / "faults").glob("kernel-*.patch"))
FLAGS = ("-std=c++20", "-O1", "-g1", "-mavx2", "-mfma", "-ffp-contract=off", "-fsanitize=address",
         "-fno-omit-frame-pointer", "-Wno-unknown-pragmas")  # fmt: skip


def compile_object(source: Path, root: Path, into: Path) -> Path:
    out = into / f"{source.stem}.o"
    command = ["g++", *FLAGS, f"-I{root / 'csrc'}", f"-I{HERE}", "-xc++", "-c", source, "-o", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    into = tmp_path_factory.mktemp("harness")
    return [compile_object(HERE / name, ROOT, into) for name in ("simulator.cpp", "probe.cpp")]


def probe(root: Path, harness: list[Path], into: Path) -> subprocess.CompletedProcess:
    rows = compile_object(root / "csrc" / "cuda" / "rows.cu", root, into)
    subprocess.run(["g++", *FLAGS, *harness, rows, "-o", into / "probe"], check=True)
    return subprocess.run([into / "probe"], capture_output=True, text=True, timeout=300, check=False)


def test_the_kernels_themselves_pass(harness, tmp_path):
    done = probe(ROOT, harness, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_five_faults_are_planted():
    assert len(FAULTS) == 5


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.stem)
def test_fault_is_caught(fault, harness, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    command = ["patch", "-p1", "--fuzz=0", "-i", fault]
    applied = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, f"the patch no longer applies: {applied.stdout}"
    done = probe(tmp_path, harness, tmp_path)
    assert done.returncode != 0, "nobody noticed"
    assert done.stdout or "ERROR: AddressSanitizer" in done.stderr, f"failed for another reason: {done.stderr}"
