"""The C++ benchmarks build without torch, check their own numbers and report them. No timing is asserted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testing import ROOT

TOOLS = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # cmake and ninja beside Python


def call(*command) -> str:
    run = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=TOOLS, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def binaries(tmp_path_factory) -> Path:
    build = tmp_path_factory.mktemp("build")
    call("cmake", "--preset", "bench", "-B", build)
    call("cmake", "--build", build)
    return build / "bench"


@pytest.fixture(scope="module")
def binary(binaries) -> Path:
    return binaries / "bench_loss"


def check_figures(case: dict) -> None:
    assert case["ms_low"] <= case["ms"] <= case["ms_high"]
    for key in ("ms", "floor_ms", "share", "ceiling_gflops", "ceiling_gbytes"):
        assert 0 < case[key] < math.inf, (case["case"], key)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_quick_run_reports_every_case(binary, dtype, tmp_path):
    path = tmp_path / "cases.jsonl"
    call(binary, "--quick", "--dtype", dtype, "--json", path)
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    names = [case["case"] for case in cases]
    assert names[0].startswith("matmul")
    assert names[1:] == [
        "copy", "read_row", "read_row, row kept", "sign_row", "head, scoring", "head, frozen", "head, trainable"
    ]  # fmt: skip
    for case in cases:
        assert case["dtype"] == dtype
        check_figures(case)


def test_offload_moves_every_byte_and_says_what_was_hidden(binaries, tmp_path):
    path = tmp_path / "cases.jsonl"
    assert "hidden; hits" in call(binaries / "bench_offload", "--quick", "--json", path)
    cases = {case["case"]: case for case in map(json.loads, path.read_text().splitlines())}
    assert list(cases) == [
        "memcpy", "arena grow", "arena 1000 x find + free", "out", "in", "step", "step, offloaded"
    ]  # fmt: skip
    for name in ("memcpy", "arena grow", "out", "in"):
        check_figures(cases[name])


def test_shape_that_fills_no_block_of_the_gemm(binary):
    call(binary, "--quick", "--tokens", 33, "--hidden", 257, "--vocabulary", 2081)  # checks logp against float64


@pytest.mark.parametrize(("argument", "value"), [("--dtype", "fp8"), ("--tokens", "0"), ("--token", "3")])
def test_bad_argument_is_named(binary, argument, value):
    run = subprocess.run([binary, argument, value], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert argument in run.stderr
