"""The formulas compile for the device as they stand: no second copy is needed there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_formulas_compile(arch, tmp_path):
    command = [NVCC, "-std=c++20", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin",
               "-I", HERE.parent.parent / "csrc", HERE / "formulas.cu", "-o", tmp_path / "formulas.cubin"]  # fmt: skip
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in run.stderr
