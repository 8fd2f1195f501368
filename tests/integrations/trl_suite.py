"""TRL's own tests of its GRPOTrainer, run with TRL's class and with ours in its place: `make trl-suite TRL=CHECKOUT`.

TRL's tests come from a checkout of its repository (the archive on PyPI has none) and run against the installed TRL, so
TRL's own class is the control: only a test that passes with it says something about ours. `trl_hub` makes what they
load from the hub.

As a pytest plugin (-p trl_suite) this file puts the class of `--grpo-trainer` in the place of `trl.GRPOTrainer`;
test_trl_suite.py runs that part on a small model.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

TRAINERS = ("trl", "longgrpo", "longgrpo-fused")
VIDEO = "its processor needs torchvision"
NOT_HERE = {
    "tiny-Qwen2VL": VIDEO,
    "tiny-Gemma4": VIDEO,
    "tiny-Qwen3_5": VIDEO,
    "test_train_with_tools_multimodal_response": VIDEO,  # Qwen3.5's
}  # part of a test's name: why it is skipped
HUBS = {"Qwen3": "not mask_truncated", "Qwen": "mask_truncated"}  # whose vocabulary is whole: the tests that run there


# ---- the plugin ----


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--grpo-trainer", choices=TRAINERS, default="longgrpo")


def pytest_configure(config: pytest.Config) -> None:
    """Before the tests are imported, so that their `from trl import GRPOTrainer` is the class asked for."""
    import datasets
    import transformers
    import trl
    import trl_hub

    datasets.load_dataset = trl_hub.load_dataset
    transformers.models.qwen2_5_vl.Qwen2_5_VLProcessor = trl_hub.processor_without_video()
    trl.GRPOTrainer = trainer_class(config.getoption("--grpo-trainer"))
    available = importlib.import_module("trl.import_utils")
    available.is_jmespath_available = lambda: True  # asked for by the tests of tools; TRL 1.16 parses without it
    available.__getattr__ = no_longer_asked_for


def no_longer_asked_for(name: str) -> Any:
    """The tests' tools ask trl.import_utils for packages that a later TRL has no function for: not there."""
    if name.startswith("is_"):
        return lambda: False
    raise AttributeError(name)


def trainer_class(name: str) -> type:
    import trl

    from longgrpo.integrations.trl import LongGRPOTrainer

    class Fused(LongGRPOTrainer):
        """With fused_loss=True; a test of an option that it refuses is skipped with the refusal as its reason."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().__init__(*args, fused_loss=True, **kwargs)
            except ValueError as error:
                if "use fused_loss=False" in str(error):
                    pytest.skip(str(error))
                raise

    return {"trl": trl.GRPOTrainer, "longgrpo": LongGRPOTrainer, "longgrpo-fused": Fused}[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for part, reason in NOT_HERE.items():
            if part in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))


# ---- control and ours ----


def copy_tests(checkout: Path, out: Path) -> None:
    """Away from the checkout's own trl, which xdist's processes would import in place of the installed one."""
    shutil.copytree(checkout / "tests", out / "tests", dirs_exist_ok=True)
    shutil.copy(checkout / "pyproject.toml", out)  # pytest's options


def run(trainer: str, out: Path, arguments: list[str]) -> dict[str, str]:
    """Test -> passed, failed or skipped, of the copied test_grpo_trainer.py with that class."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    results = {}
    for hub, selection in HUBS.items():
        report = out / f"{trainer}-{hub}.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-p", "trl_suite", f"--grpo-trainer={trainer}"]
        command += ["-k", selection, f"--junitxml={report}", "-q", "--tb=short", "-rs", *arguments]
        command += [str(out / "tests/test_grpo_trainer.py")]
        subprocess.run(command, env={**environment, "HF_HOME": str(out / hub)}, check=False)
        results |= read_report(report)
    return results


def read_report(report: Path) -> dict[str, str]:
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    results = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        found = [kinds[child.tag] for child in case if child.tag in kinds]
        results[f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"] = found[0] if found else "passed"
    return results


def compare(results: dict[str, dict[str, str]]) -> tuple[str, list[str]]:
    """(table, the tests that pass with TRL's class and fail with one of ours)"""
    lines = ["| class | passed | failed | skipped |", "|---|---|---|---|"]
    for trainer, outcomes in results.items():
        counts = [str(list(outcomes.values()).count(kind)) for kind in ("passed", "failed", "skipped")]
        lines.append(f"| {trainer} | {' | '.join(counts)} |")
    worse = [
        f"{trainer}: {test}"
        for trainer, outcomes in results.items()
        for test, control in results["trl"].items()
        if control == "passed" and outcomes.get(test, "failed") == "failed"
    ]
    return "\n".join(lines), worse


def main() -> int:
    import trl_hub

    parser = argparse.ArgumentParser(description=__doc__, epilog="Other arguments are pytest's.")
    parser.add_argument("--trl", type=Path, required=True, help="a checkout of TRL's repository")
    parser.add_argument("--vocabulary", type=Path, required=True, help="dashscope's wheel, which carries Qwen's")
    parser.add_argument("--out", type=Path, default=Path("build/trl-suite"))
    options, arguments = parser.parse_known_args()
    out = options.out.resolve()
    with zipfile.ZipFile(options.vocabulary) as wheel:
        vocabulary = wheel.read("dashscope/resources/qwen.tiktoken").decode()
    for hub in HUBS:
        trl_hub.make_hub(options.trl, vocabulary, out / hub, whole_for=hub)
    copy_tests(options.trl, out)
    results = {trainer: run(trainer, out, arguments) for trainer in TRAINERS}
    table, worse = compare(results)
    print(table, "Passes with TRL's class and fails with ours:", *(worse or ["none"]), sep="\n")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
