"""Ranks against one process on the same cores: throughput, and the share of time in collectives.

    python bench/ranks.py examples/smollm2-sums.yaml --ranks 2 --train.steps 4

One rank has all cores, N ranks have a part each. The first step warms up and is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

OFF = ["--task.eval_n", "0", "--train.probe_prompts", "0", "--train.save_steps", "0"]


def trained(config: Path, directory: Path, ranks: int, cores: int, overrides: list[str]) -> list[dict[str, float]]:
    """The metrics of the steps after the first."""
    command = [sys.executable, "-m", "longgrpo", "train", str(config), "--output_dir", str(directory), *OFF, *overrides]
    threads = {"OMP_NUM_THREADS": str(max(1, cores // ranks))}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, "--ranks", str(ranks)], check=True, env=os.environ | threads, **silent)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["step"] > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    options, overrides = parser.parse_known_args()
    cores = len(os.sched_getaffinity(0))
    names = ("ranks", "threads", "s a step", "tokens/s", "rollout s", "collectives", "skew s")
    print("".join(f"{name:>12}" for name in names))
    for ranks in (1, options.ranks):
        with tempfile.TemporaryDirectory() as folder:
            steps = trained(options.config, Path(folder) / "run", ranks, cores, overrides)
        seconds, rollout = (fmean(step[f"seconds/{name}"] for step in steps) for name in ("step", "roll_out"))
        tokens = fmean(step["completion_length/sum"] / step["seconds/step"] for step in steps)
        spent, skew = (
            fmean(step.get(f"seconds/{name}", 0.0) for step in steps) for name in ("collectives", "rank_skew")
        )
        share = f"{spent / (seconds - rollout):.1%}"  # of the time beside the rollout
        row = (
            str(ranks),
            str(cores // ranks),
            f"{seconds:.2f}",
            f"{tokens:.1f}",
            f"{rollout:.2f}",
            share,
            f"{skew:.2f}",
        )
        print("".join(f"{value:>12}" for value in row), flush=True)


if __name__ == "__main__":
    main()
