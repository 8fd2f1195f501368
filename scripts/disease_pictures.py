"""Gives every disease to a tiny model and draws what shows it beside a healthy run, for docs/healthy-run.md:

python scripts/disease_pictures.py [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from curves import panels_of, save  # noqa: E402

from longgrpo.report import Run, read_run  # noqa: E402
from testing.diseases import DISEASES, Disease, give  # noqa: E402
from testing.models import write_tiny_llama  # noqa: E402

FOLDER = ROOT / "docs" / "healthy-run"


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_tiny_llama(
            Path(scratch) / "model", intermediate_size=64, initializer_range=0.02, tie_word_embeddings=True
        )
        longest = max(DISEASES[name].changes.get("train", {}).get("steps", 12) for name in names)
        give(Disease({"train": {"steps": longest}, "loss": {"beta": 1e-3}}), model, Path(scratch) / "healthy")
        healthy = read_run(Path(scratch) / "healthy")
        for name in names:
            give(DISEASES[name], model, Path(scratch) / name)
            draw(name, healthy, read_run(Path(scratch) / name))


def draw(name: str, healthy: Run, diseased: Run) -> None:
    """The disease's metric in both runs, and where the watch named it."""
    found = next(found for found in diseased.findings if found.name == name)
    figure, (axis,) = panels_of(1)
    for label, run, color in (("healthy", healthy, "C2"), (name, diseased, "C1")):
        steps, values = run.series(found.metric)
        until = sum(step <= max(diseased.metrics) for step in steps)
        if until:
            axis.plot(steps[:until], values[:until], color=color, marker=".", label=label)
    axis.axvline(found.begin, color="C1", linestyle=":")
    axis.set(title=found.metric, xlabel="step")
    axis.legend(fontsize=7)
    save(figure, FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main(sys.argv[1:] or list(DISEASES))
