"""The loss's own tests with the CUDA path on the simulator in place of the CPU: same ops, autograd and oracles.

Both tilings and every schedule take part; one run is under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from simulated import BUILD, HERE, ROOT, build

# A million tokens, and workspaces that the CPU path alone can do with.
LEFT_OUT = "not no_length_limit and not smollm2 and not tiles_change_nothing and not twice_plain_torch"
SUITES = [f"tests/loss/test_{name}.py" for name in ("grpo", "rules", "linear", "correction", "wide")]


def run_suite(*options: str, suites: list[str] = SUITES, left_out: str = LEFT_OUT, **environment: str) -> None:
    path = os.pathsep.join([str(HERE), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "simulated_plugin", "-p", "no:cacheprovider", "-W", "ignore",
         "-k", left_out, *suites, *options],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_as_the_rule_tiles():
    run_suite("--simulated-schedule", "reverse", "--simulated-examples", "15")


def test_scoring_on_the_tensor_cores():
    # The kernel adds a logit's products in its own order, so its bits are not those of the GEMM that training takes.
    run_suite("--simulated-score", "--simulated-schedule", "shuffled", "--simulated-examples", "15",
              suites=["tests/loss/test_linear.py"], left_out=f"{LEFT_OUT} and not give_the_same_bits")  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("rows", "chunk"), [(16, 0), (16, 64)], ids=["whole rows", "chunks"])
def test_small_tiles(rows, chunk):
    # Chunks of 64 columns are no whole segments, so the bits may differ; test_kernels has the real ones. They give a
    # trained head two passes, 4 GEMMs, where the rule takes 3 for heads as small as these.
    apart = " and not ratio_is_exactly_one and not gemms_of_the_head"
    run_suite("--simulated-tiles", f"{rows},{chunk}", "--simulated-schedule", "shuffled", "--simulated-examples", "8",
              left_out=LEFT_OUT + apart * bool(chunk))  # fmt: skip


@pytest.mark.long
def test_under_sanitizers():
    build(BUILD.with_name("kernels-sanitized"), sanitize="address,undefined")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    sanitized = {
        "SIMULATED_BUILD": str(BUILD.with_name("kernels-sanitized")), "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
    }  # fmt: skip
    run_suite("--simulated-tiles", "16,64", "--simulated-examples", "4", suites=SUITES[:1], **sanitized)
    run_suite(suites=["tests/native/kernels/test_kernels.py"], left_out="test_scale_rows", **sanitized)
