"""rollout.bitwise against a run without it, in bfloat16 over several seeds, on docs/bitwise.md; goes on where it was
stopped.

    python bench/bitwise.py [--seeds 0 1 2] [--only-draw]

Each run is examples/smollm2-calculator.yaml with LoRA in `views`, in runs/bitwise/WITH-SEED. The page's table is drawn
anew from the runs' own files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from curves import curves_of, splice
from seeds import train

CONFIG = Path("examples/smollm2-calculator.yaml")
PAGE = Path("docs/bitwise.md")
BOTH = ["--model.dtype", "bfloat16", "--lora.mode", "views"]
SETTINGS = {"with": ["--rollout.bitwise", "true", "--rollout.importance", "none"], "without": []}
RATIO = "importance_ratio_mean"
GAPS = ("engine_trainer_logprob_diff_mean", "engine_trainer_logprob_diff_max")


def row(setting: str, directory: Path) -> dict[str, str]:
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    curves = curves_of(directory, [RATIO, *GAPS, "reward/mean"])
    rewards, (mean_gap, largest) = curves["reward/mean"], (curves[name] for name in GAPS)
    return {
        "`rollout.bitwise`": setting,
        "seed": str(summary["seed"]),
        "ratio, lowest and highest mean of a step": f"{min(curves[RATIO]):.4f}, {max(curves[RATIO]):.4f}",
        "gap in nats, mean and largest": f"{mean(mean_gap):.4f}, {max(largest):.4f}" if max(largest) else "0.0, 0.0",
        "reward, first and last step": f"{rewards[0]:.2f}, {rewards[-1]:.2f}",
        "held-out, before and after": f"{summary['eval_before']:.3f}, **{summary['eval_after']:.3f}**",
    }


def write_page(page: Path, runs: Sequence[tuple[str, Path]]) -> None:
    rows = [row(setting, run) for setting, run in runs]
    table = [list(rows[0]), ["---"] * len(rows[0]), *(list(one.values()) for one in rows)]
    splice(page, [f"| {' | '.join(cells)} |" for cells in table])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only-draw", action="store_true", help="from the runs that are there")
    args = parser.parse_args()
    runs = [(name, Path("runs") / "bitwise" / f"{name}-{seed}", seed) for seed in args.seeds for name in SETTINGS]
    for name, run, seed in [] if args.only_draw else runs:
        train(CONFIG, run, seed, [*BOTH, *SETTINGS[name]])
    done = [(name, run) for setting in SETTINGS for name, run, _ in runs if name == setting]
    write_page(PAGE, [(name, run) for name, run in done if (run / "summary.json").exists()])


if __name__ == "__main__":
    main()
