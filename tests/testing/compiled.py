"""Torch-free C++ as a Python module, built by cmake once however many processes ask for it."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testing import ROOT, load

__all__ = ["ROOT", "build", "load"]


def build(source: Path, into: Path, *definitions: str) -> Path:
    """The one module of the project `source`, built in the folder `into`; skips the test where it cannot be."""
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs cmake and pybind11")
    configure = [cmake, "-S", source, "-B", into, f"-DPython_EXECUTABLE={sys.executable}", *definitions]
    into.mkdir(parents=True, exist_ok=True)
    with (into / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", into, "-j", str(os.cpu_count())]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    (path,) = into.glob("*.so")
    return path
