"""The main job over several seeds: `make first-run`, which goes on where it was stopped.

Each run is `longgrpo train examples/smollm2-sums.yaml` with one seed. The table and the curves of docs/first-run.md are
drawn anew from the runs' own files.

    python bench/first_run.py [--seeds 0 1 2] [--runs runs/first] [--only-draw]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curves import curves_of, draw, splice

from longgrpo.memory.cards import GIB

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "examples" / "smollm2-sums.yaml"
PAGE = ROOT / "docs" / "first-run.md"
CURVES = {
    "reward/exact_answer/mean": "share of sampled replies that are right",
    "entropy": "entropy, nats a token",
    "completion_length/truncated": "share of replies cut off",
}
COLUMNS = ("seed", "before", "by the last number", "after", "difference", "cut off", "seconds", "peak memory")


def train(directory: Path, seed: int) -> None:
    """The run in `directory`, from its last checkpoint if there is one."""
    if (directory / "summary.json").exists():
        return
    new = [CONFIG, "--train.seed", seed, "--output_dir", directory]
    options = ["--resume", directory] if (directory / "config.yaml").exists() else new
    subprocess.run([sys.executable, "-m", "longgrpo.cli", "train", *map(str, options)], check=True)


def row(directory: Path) -> list[str]:
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    low, high = summary["eval_diff_interval"]
    cut = curves_of(directory, ["completion_length/truncated"])["completion_length/truncated"]
    return [
        str(summary["seed"]),
        f"{summary['eval_before']:.3f}",
        f"{summary['eval_before_last_number']:.3f}",
        f"**{summary['eval_after']:.3f}**",
        f"{summary['eval_diff']:+.3f} [{low:+.3f}, {high:+.3f}]",
        f"{cut[0]:.2f} to {cut[-1]:.2f}",
        f"{summary['seconds']:.0f}",
        f"{summary['peak_rss_bytes'] / GIB:.1f} GiB",
    ]


def write_page(runs: Sequence[Path]) -> None:
    curves = [curves_of(run, list(CURVES)) for run in runs]
    image = PAGE.with_name("first-run.svg")
    draw(CURVES, {"": {name: [one[name] for one in curves] for name in CURVES}}, image)
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(row, runs)]
    table = [f"| {' | '.join(cells)} |" for cells in rows]
    splice(PAGE, [*table, "", f"![curves over the seeds]({image.name})", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/first"))
    parser.add_argument("--only-draw", action="store_true", help="from the runs that are there")
    args = parser.parse_args()
    runs = [args.runs / f"seed-{seed}" for seed in args.seeds]
    if not args.only_draw:
        for seed, run in zip(args.seeds, runs, strict=True):
            train(run, seed)
    write_page([run for run in runs if (run / "summary.json").exists()])


if __name__ == "__main__":
    main()
