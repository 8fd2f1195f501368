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


KERNELS = ("rows", "flash", "matrix", "token_loss")


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    into = tmp_path_factory.mktemp("harness")
    sources = [HERE / f"{name}.cpp" for name in ("simulator", "simulated_tensor_core", "probe")]
    sources += [ROOT / "csrc" / "cuda" / f"{name}.cu" for name in KERNELS]
    return {source.stem: compile_object(source, ROOT, into) for source in sources}


def probe(kernel: str, harness: dict[str, Path], into: Path) -> subprocess.CompletedProcess:
    subprocess.run(["g++", *FLAGS, *harness.values(), "-o", into / "probe"], check=True)
    return subprocess.run([into / "probe", kernel], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_themselves_pass(kernel, harness, tmp_path):
    done = probe(kernel, harness, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def kernel_of(fault: Path) -> str:
    """Which source is compiled with the fault, and probed; it is in rows.cuh or below if the name does not say."""
    named = [kernel for kernel in KERNELS if fault.stem.startswith(f"kernel-{kernel.replace('_', '-')}-")]
    return named[0] if named else "rows"


def test_each_source_has_faults():
    planted = [kernel_of(fault) for fault in FAULTS]
    assert {kernel: planted.count(kernel) for kernel in KERNELS} == {
        "rows": 5,
        "flash": 4,
        "matrix": 2,
        "token_loss": 2,
    }


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.stem)
def test_fault_is_caught(fault, harness, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    command = ["patch", "-p1", "--fuzz=0", "-i", fault]
    applied = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, f"the patch no longer applies: {applied.stdout}"
    kernel = kernel_of(fault)
    faulty = compile_object(tmp_path / "csrc" / "cuda" / f"{kernel}.cu", tmp_path, tmp_path)
    done = probe(kernel, harness | {kernel: faulty}, tmp_path)
    assert done.returncode != 0, "nobody noticed"
    assert done.stdout or "ERROR: AddressSanitizer" in done.stderr, f"failed for another reason: {done.stderr}"
