"""A config over several seeds, and what comes of it on a page of the docs; goes on where it was stopped.

    python bench/seeds.py examples/smollm2-calculator.yaml docs/first-run.md [--seeds 0 1 2] [--only-draw]

Each run is `longgrpo train CONFIG` with one seed, in runs/NAME/seed-SEED. The page's table and curves are drawn anew
from the runs' own files.
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

CURVES = {
    "reward/mean": "mean reward of the sampled replies",
    "entropy": "entropy, nats a token",
    "completion_length/truncated": "share of replies cut off",
    "turns/mean": "turns of an episode",  # of runs with tools or an environment
}


def train(config: Path, directory: Path, seed: int, overrides: Sequence[str] = ()) -> None:
    """The run in `directory`, from its last checkpoint if there is one."""
    if (directory / "summary.json").exists():
        return
    new = [config, "--train.seed", seed, "--output_dir", directory, *overrides]
    options = ["--resume", directory] if (directory / "config.yaml").exists() else new
    subprocess.run([sys.executable, "-m", "longgrpo.cli", "train", *map(str, options)], check=True)


def controls(summary: dict[str, Any]) -> list[str]:
    """The names of the held-out sets beside the main one."""
    return [name.removeprefix("eval_before_") for name in summary if name.startswith("eval_before_")]


def row(directory: Path) -> dict[str, str]:
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    low, high = summary["eval_diff_interval"]
    cut = curves_of(directory, ["completion_length/truncated"])["completion_length/truncated"]
    return {
        "seed": str(summary["seed"]),
        "before": f"{summary['eval_before']:.3f}",
        "after": f"**{summary['eval_after']:.3f}**",
        "difference": f"{summary['eval_diff']:+.3f} [{low:+.3f}, {high:+.3f}]",
        **{
            f"`{name}`, before and after": f"{summary[f'eval_before_{name}']:.3f}, {summary[f'eval_after_{name}']:.3f}"
            for name in controls(summary)
        },
        "cut off, first and last step": f"{cut[0]:.2f}, {cut[-1]:.2f}",
        "findings at the end": ", ".join(summary["findings"]) or "none",
        "seconds": f"{summary['seconds']:.0f}",
        "peak memory": f"{summary['peak_rss_bytes'] / GIB:.1f} GiB",
    }


def write_page(page: Path, runs: Sequence[Path]) -> None:
    curves = [curves_of(run, list(CURVES)) for run in runs]
    panels = {name: title for name, title in CURVES.items() if all(one[name] for one in curves)}
    image = page.with_suffix(".svg")
    draw(panels, {"": {name: [one[name] for one in curves] for name in panels}}, image)
    rows = [row(run) for run in runs]
    table = [list(rows[0]), ["---"] * len(rows[0]), *(list(one.values()) for one in rows)]
    splice(page, [*(f"| {' | '.join(cells)} |" for cells in table), "", f"![curves over the seeds]({image.name})"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only-draw", action="store_true", help="from the runs that are there")
    args = parser.parse_args()
    runs = [Path("runs") / args.config.stem / f"seed-{seed}" for seed in args.seeds]
    if not args.only_draw:
        for seed, run in zip(args.seeds, runs, strict=True):
            train(args.config, run, seed)
    write_page(args.page, [run for run in runs if (run / "summary.json").exists()])


if __name__ == "__main__":
    main()
