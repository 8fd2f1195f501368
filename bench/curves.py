"""Curves of several runs on a page of the docs: a line a group, a band over its seeds, and the place of the results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

WINDOW = 3  # steps of the running mean

Curves = Sequence[Sequence[float]]  # a curve a seed, of equal length


def curves_of(run: Path, names: Sequence[str]) -> dict[str, list[float]]:
    """The metrics of a run, a value a step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: [round(row[name], 5) for row in rows if row["step"] > 0 and name in row] for name in names}


def solved_in(run: Path, when: str) -> list[int]:
    """Which held-out problems the run's evaluation `when` solved, in their order."""
    scores = json.loads((run / f"eval_{when}.json").read_text())["scores"]
    return [int(score >= 1.0) for score in scores]


def panels_of(count: int) -> tuple[Any, Sequence[Any]]:
    """A figure of `count` panels side by side, and their axes; the same numbers give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "longgrpo", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(4 * count, 3.4), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw(panels: Mapping[str, str], groups: Mapping[str, Mapping[str, Curves]], path: Path) -> None:
    """A panel a metric (its title); in each a line a group, the mean of its seeds, and a band over what they span."""
    figure, axes = panels_of(len(panels))
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for label, curves in groups.items():
            values = torch.tensor(curves[name]).unfold(1, WINDOW, 1).mean(-1)  # [S, steps - WINDOW + 1]
            steps = range(2, 2 + values.shape[1])
            axis.plot(steps, values.mean(0), label=label)
            axis.fill_between(steps, values.amin(0), values.amax(0), alpha=0.12, linewidth=0)
        axis.set(title=title, xlabel="step")
    if len(groups) > 1:
        axes[0].legend(fontsize=7)
    save(figure, path)


def splice(page: Path, lines: Sequence[str]) -> None:
    """Replaces what lies between the page's markers."""
    before, begin, rest = page.read_text().partition("<!-- results -->\n")
    _, end, after = rest.partition("<!-- end of results -->")
    page.write_text("".join([before, begin, "\n", "\n".join(lines).strip(), "\n\n", end, after]))
