"""The core without Python: its stress program, under the sanitizers, and with each planted fault."""

import shutil
import subprocess

import pytest

from conftest import ROOT, compile_stress

FAULTS = sorted((ROOT / "tests" / "faults").glob("offload-*.patch"))


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


def test_there_are_seven_faults():
    assert len(FAULTS) == 7


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
