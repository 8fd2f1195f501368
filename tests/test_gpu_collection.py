"""The GPU's tests where there is no GPU: they can be collected, with hypothesis and with what stands in for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parent / "gpu"


@pytest.mark.parametrize("path", ["", str(GPU / "stand_in")], ids=["hypothesis", "stand-in"])
def test_collected(path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:hypothesispytest",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, GPU], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for name in ("test_loss.py::test_logprob", "test_offload.py::test_gradients"):
        assert name in done.stdout
