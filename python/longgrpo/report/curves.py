"""Curves as the page's script draws them: of each a point a step, thinned if there are many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

POINTS = 2000  # that a curve has at most: more than a screen has pixels for
DIGITS = 9  # of a value: a float32 is told from its neighbors

Values = Sequence[float | None]


@dataclass(frozen=True)
class Curve:
    """One metric of one run: values at steps, None if there is none, and perhaps a band around it."""

    run: int
    metric: str
    label: str
    steps: Sequence[int]
    values: Values
    low: Values = ()
    high: Values = ()

    @property
    def flat(self) -> bool:
        """Whether it says the same at several steps."""
        everything = [*self.values, *self.low, *self.high]
        return len(self.steps) > 1 and None not in everything and len(set(everything)) == 1


@dataclass(frozen=True)
class Mark:
    """Something that happened to a run at a step."""

    run: int
    step: int
    text: str


def thinned(curve: Curve) -> Curve:
    """At most POINTS points: neighbors become their mean, and the band keeps its extremes."""
    size = math.ceil(len(curve.steps) / POINTS)
    if size == 1:
        return curve
    return Curve(
        run=curve.run,
        metric=curve.metric,
        label=curve.label,
        steps=[part[-1] for part in _parts(curve.steps, size)],
        values=[_over(part, lambda known: math.fsum(known) / len(known)) for part in _parts(curve.values, size)],
        low=[_over(part, min) for part in _parts(curve.low, size)],
        high=[_over(part, max) for part in _parts(curve.high, size)],
    )


def drawn(curves: Sequence[Curve], marks: Sequence[Mark] = (), kind: str = "lines") -> dict[str, Any] | None:
    """A chart for the page's script; None if no curve has a finite value. kind: "lines" or "layers", one on the other,
    the first at the bottom."""
    lines = [_line(thinned(curve)) for curve in curves if any(value is not None for value in curve.values)]
    if not lines:
        return None
    return {
        "kind": kind,
        "lines": lines,
        "marks": [{"run": mark.run, "step": mark.step, "text": mark.text} for mark in marks],
    }


def _line(curve: Curve) -> dict[str, Any]:
    values = {name: [_rounded(value) for value in getattr(curve, name)] for name in ("values", "low", "high")}
    return {"run": curve.run, "metric": curve.metric, "label": curve.label, "steps": list(curve.steps), **values}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _parts(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _over(part: Values, summary: Any) -> float | None:
    known = [value for value in part if value is not None]
    return summary(known) if known else None
