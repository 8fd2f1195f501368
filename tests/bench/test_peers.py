"""`bench/peers.py` runs wherever it is, with whichever peers are there. No timing is asserted."""

import json
import math
import subprocess
import sys

import pytest

from testing import ROOT

SCRIPT = ROOT / "bench" / "peers.py"
ALWAYS_THERE = {"naive", "naive packed", "torch", "GEMMs fp32", "GEMMs bf16"}
OURS = {"frozen": "linear_grpo_loss", "trainable": "linear_grpo_loss", "scoring": "linear_logprob"}


def run(*arguments) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("peers") / "records.jsonl"
    assert "Targets" in run("--quick", "--no-memory", "--json", path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_says_where_and_what_it_was(records):
    about = records[0]
    assert about["kind"] == "run"
    assert about["versions"]["torch"]
    assert "--quick" in about["command"]


def test_every_case_has_our_rows_and_finite_figures(records):
    results = [r for r in records if r["kind"] == "result"]
    cases = {json.dumps(r["case"]) for r in results}
    assert len(cases) == 8  # those with a target, in two dtypes
    for case in cases:
        rows = {r["program"]: r for r in results if json.dumps(r["case"]) == case}
        mode, dtype = json.loads(case)["mode"], json.loads(case)["dtype"]
        needed = ALWAYS_THERE | {OURS[mode]}
        assert needed <= {name for name, row in rows.items() if not row["failed"]}
        for name, row in rows.items():
            if row["failed"]:
                assert name not in needed  # a peer that is not installed says so
                continue
            assert all(math.isfinite(value) and value > 0 for value in row["ms"] + row["over_own"] + row["over_faster"])
        assert rows[OURS[mode]]["error"] < (1e-5 if dtype == "fp32" else 1e-2)


def test_targets_compare_the_edge_of_the_spread(records):
    targets = [r for r in records if r["kind"] == "target"]
    assert len(targets) >= 8
    for target in targets:
        edge = target["value"]["high"] if target["at_most"] else target["value"]["low"]
        assert target["met"] == (edge <= target["limit"] if target["at_most"] else edge >= target["limit"])


def test_memory_of_one_program_in_its_own_process():
    tokens, hidden, vocabulary = 512, 64, 8192
    case = {"shape": [1, tokens, hidden, vocabulary], "dtype": "fp32", "mode": "frozen"}
    extra = int(run("--memory-of", json.dumps(case), "naive"))
    assert extra > 2 * 4 * tokens * vocabulary  # the logits and their softmax
