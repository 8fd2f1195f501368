"""The built _cuda.so: torch's stable ABI alone, no path to where it was built, no CUDA library to find."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

LIBRARY = Path(str(files("longgrpo") / "_cuda.so"))

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="built without nvcc")


def output(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_stable_abi():
    audit = Path(sys.executable).with_name("torch-abi-audit")
    if not audit.is_file():
        pytest.skip("needs torch-abi-audit")
    report = output(audit, LIBRARY, "--check", "torch")
    assert "unstable=0" in report
    assert "min-torch=2.11.0" in report


def test_needs_nothing_but_torch():
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    dynamic = output("readelf", "-d", LIBRARY)
    assert "libtorch.so" in dynamic
    unwanted = ("libcudart", "libtorch_cpu", "libtorch_python", "libc10", "RUNPATH", "RPATH")
    assert not [word for word in unwanted if word in dynamic]
