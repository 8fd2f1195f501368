"""A run in a notebook: a line of progress above small live plots, in place of the terminal's bar."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

SHOWN = ("reward/mean", "eval/accuracy", "entropy", "completion_length/mean", "grad_norm")
WIDTH, HEIGHT = 360, 48  # pixels of a plot


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose outputs can be replaced."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


class LivePlots:
    """One output of a notebook's cell, redrawn after each step of a run of `steps`."""

    def __init__(self, steps: int) -> None:
        ipython: Any = importlib.import_module("IPython.display")
        self._steps, self._html = steps, ipython.HTML
        self._points: dict[str, list[tuple[int, float]]] = {name: [] for name in SHOWN}
        self._output: Any = ipython.display(ipython.HTML(""), display_id=True)

    def update(self, metrics: Mapping[str, Any], status: str = "") -> None:
        """The metrics of a step join the plots."""
        step = metrics["step"]
        for name, points in self._points.items():
            if metrics.get(name) is not None:
                points.append((step, metrics[name]))
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{plot(points, self._steps)}</td><td>{points[-1][1]:.3f}</td></tr>"
            for name, points in self._points.items()
            if points
        )
        head = f"<progress value={step} max={self._steps}></progress> step {step}/{self._steps}  {escape(status)}"
        self._output.update(self._html(f"<div>{head}</div><table>{rows}</table>"))


def plot(points: Sequence[tuple[int, float]], steps: int) -> str:
    """An SVG of the points (step, value), its height from the lowest value to the highest."""
    values = [value for _, value in points]
    low, size = min(values), (max(values) - min(values)) or 1.0
    places = [
        (WIDTH * step / max(steps, 1), 2 + (HEIGHT - 4) * (1 - (value - low) / size)) for step, value in points
    ]  # fmt: skip
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    x, y = places[-1]
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}"><polyline points="{line}" fill="none" stroke="currentColor"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="currentColor"/></svg>'
    )
