"""The core without Python: its stress program, under the sanitizers, and with each planted fault."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from testing.compiled import ROOT

CORE = ("engine.cpp", "arena.cpp", "host_backend.cpp")
FAULTS = sorted((ROOT / "tests" / "faults").glob("offload-*.patch"))


def compile_stress(root: Path, into: Path, *flags: str, reuse: Path | None = None) -> Path:
    """Builds the stress program of the tree `root`. Objects of unchanged sources are taken from `reuse`."""
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if cxx is None:
        pytest.skip("needs a C++ compiler")
    into.mkdir(parents=True, exist_ok=True)

    def unchanged(path: Path) -> bool:
        return path.read_bytes() == (ROOT / path.relative_to(root)).read_bytes()

    core, objects, jobs = root / "csrc" / "offload", [], []
    for source in [*(core / name for name in CORE), root / "tests" / "native" / "offload" / "stress.cpp"]:
        ours = into / f"{source.stem}.o"
        if reuse is not None and unchanged(source) and all(map(unchanged, core.glob("*.h"))):
            ours = reuse / ours.name
        else:
            command = [cxx, "-std=c++20", "-g", "-Wall", "-Wextra", *flags, f"-I{core}", "-c", source, "-o", ours]
            jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        objects.append(ours)
    for job in jobs:
        _, error = job.communicate()
        assert job.returncode == 0, error
    subprocess.run([cxx, *flags, *objects, "-pthread", "-o", into / "stress"], check=True)
    return into / "stress"


def run(program, count):
    done = subprocess.run([program, str(count)], capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return compile_stress(ROOT, tmp_path_factory.mktemp("stress"))


def test_stress(plain):
    code, output = run(plain, 300)
    assert code == 0, output


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizer(sanitizer, tmp_path):
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    code, output = run(compile_stress(ROOT, tmp_path, *flags), 40)
    assert code == 0, output


def test_there_are_nine_faults():
    assert len(FAULTS) == 9


@pytest.mark.parametrize("fault", FAULTS, ids=lambda path: path.stem)
def test_planted_fault_is_caught(fault, plain, tmp_path):
    for folder in ("csrc/offload", "tests/native/offload"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    patch = ["patch", "-p1", "--fuzz=0", "-i", fault]
    applied = subprocess.run(patch, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, f"the patch no longer applies: {applied.stdout}"
    code, output = run(compile_stress(tmp_path, tmp_path / "out", reuse=plain.parent), 300)
    assert code == 1, f"not caught: {output}"
    assert "FAILED" in output
