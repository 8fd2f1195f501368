"""The tuner's table for heads of several sizes beside the choice of the model of waves. Part of `make gpu`:

python bench/autotune.py [--json FILE] [--dry-run]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from longgrpo import autotune

HEADS = ((4096, 151_936), (2048, 128_256), (1536, 151_936), (5120, 100_352), (576, 49_152))  # H, V


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="append JSON lines to this file")
    parser.add_argument("--dry-run", action="store_true", help="small heads on the CPU: does it run")
    options = parser.parse_args()
    for hidden, vocabulary in ((32, 512),) if options.dry_run else HEADS:
        for trained in (False, True):
            tuning = autotune(
                hidden_size=hidden, vocab_size=vocabulary, dtype=torch.bfloat16, trained=trained, cached=False,
                device="cpu" if options.dry_run else "cuda", tokens=64 if options.dry_run else None,
            )  # fmt: skip
            print(tuning.table(), tuning.text(), sep="\n", flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(tuning.json().replace("\n", "") + "\n")


if __name__ == "__main__":
    main()
