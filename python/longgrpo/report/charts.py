"""Curves and stacked areas as SVG paths, in the units of a viewBox. The template draws them; nothing here is HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
COLUMNS = 200  # points that a curve has at most: about one for each two pixels
SMOOTHED_FROM = 24  # points; a shorter curve is shown as it is
MARKED_UNTIL = 12  # points; a shorter curve has a dot at each

Values = Sequence[float | None]


@dataclass(frozen=True)
class Curve:
    """One metric of one run: values at steps, None if there is none, and perhaps a band around it."""

    run: int
    label: str
    steps: Sequence[int]
    values: Values
    dashed: bool = False
    low: Values = ()
    high: Values = ()


@dataclass(frozen=True)
class Shape:
    """An SVG path and the classes that say how it is drawn."""

    d: str
    classes: str


@dataclass
class Drawing:
    shapes: list[Shape]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    data: dict[str, Any]
    """What the page's script shows below the pointer: the frame, and each curve's points."""
    dots: list[tuple[float, float, str]] = field(default_factory=list)
    marks: list[tuple[float, str, str]] = field(default_factory=list)
    """Upright lines: x, classes, and what it says."""


@dataclass(frozen=True)
class Mark:
    """Something that happened to a run at a step."""

    run: int
    step: int
    text: str


class Frame:
    """The position of a step and a value in the viewBox. The range of values is widened to its ticks."""

    def __init__(self, steps: Sequence[int], values: Sequence[float]) -> None:
        self._x0, self._x1 = _domain(steps)
        low, high = min(values), max(values)
        least = max(abs(low), abs(high)) / 50 or 2.0  # a smaller range would blow rounding up to a curve
        if high - low < least:
            low, high = (low + high - least) / 2, (low + high + least) / 2
        ticks, every = _ticks(low, high, 4)
        self._y0, self._y1 = ticks[0], ticks[-1]
        self.y_ticks = [(self.y(tick), tick_text(tick, every)) for tick in ticks]
        x_ticks, every = _ticks(self._x0, self._x1, 5, whole=True)
        inside = [tick for tick in x_ticks if self._x0 <= tick <= self._x1]
        self.x_ticks = [(self.x(tick), tick_text(tick, every)) for tick in inside]

    def x(self, step: float) -> float:
        return LEFT + (step - self._x0) / (self._x1 - self._x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self._y0) / (self._y1 - self._y0) * (HEIGHT - TOP - BOTTOM)

    def line(self, steps: Sequence[float], values: Values) -> str:
        """A path, broken at missing values."""
        parts, pen = [], "M"
        for step, value in zip(steps, values, strict=True):
            if value is None:
                pen = "M"
                continue
            parts.append(f"{pen}{self.x(step):.1f} {self.y(value):.1f}")
            pen = "L"
        return "".join(parts)

    def area(self, steps: Sequence[float], low: Values, high: Values) -> str:
        known = [(s, a, b) for s, a, b in zip(steps, low, high, strict=True) if a is not None and b is not None]
        there = self.line([s for s, _, _ in known], [b for _, _, b in known])
        back = self.line([s for s, _, _ in reversed(known)], [a for _, a, _ in reversed(known)])
        return f"{there}L{back[1:]}Z" if known else ""


def curves(drawn: Sequence[Curve], marks: Sequence[Mark] = ()) -> Drawing | None:
    """None if no curve has a finite value. A long curve is drawn twice: as it is, and its running mean."""
    drawn = [thinned(curve) for curve in drawn if any(value is not None for value in curve.values)]
    if not drawn:
        return None
    everything = [v for c in drawn for values in (c.values, c.low, c.high) for v in values if v is not None]
    frame = Frame([step for curve in drawn for step in curve.steps], everything)
    drawing = Drawing([], frame.x_ticks, frame.y_ticks, _data(drawn))
    drawing.marks = [(frame.x(mark.step), f"run-{mark.run}", mark.text) for mark in marks]
    for curve in drawn:
        color = f"run-{curve.run}" + (" dashed" if curve.dashed else "")
        if len(curve.low):
            drawing.shapes.append(Shape(frame.area(curve.steps, curve.low, curve.high), f"band run-{curve.run}"))
        smooth = len(curve.values) >= SMOOTHED_FROM
        drawing.shapes.append(Shape(frame.line(curve.steps, curve.values), f"line {'raw ' if smooth else ''}{color}"))
        if smooth:
            mean = running_mean(curve.values, len(curve.values) // 10)
            drawing.shapes.append(Shape(frame.line(curve.steps, mean), f"line {color}"))
        elif len(curve.values) <= MARKED_UNTIL:
            points = zip(curve.steps, curve.values, strict=True)
            drawing.dots += [(frame.x(s), frame.y(v), color) for s, v in points if v is not None]
    return drawing


def stacked(steps: Sequence[int], layers: dict[str, list[float]], run: int) -> Drawing:
    """Areas one on the other, the first at the bottom."""
    thin = [thinned(Curve(run, name, steps, values)) for name, values in layers.items()]
    tops = [[0.0] * len(thin[0].steps)]
    for layer in thin:
        tops.append([below + (value or 0.0) for below, value in zip(tops[-1], layer.values, strict=True)])
    frame = Frame(thin[0].steps, [0.0, *tops[-1]])
    steps = thin[0].steps
    if len(steps) == 1:  # an area needs a width
        steps, tops = [steps[0], steps[0] + 1], [top * 2 for top in tops]
    shapes = [Shape(frame.area(steps, tops[i], tops[i + 1]), f"layer phase-{i}") for i in range(len(layers))]
    return Drawing(shapes, frame.x_ticks, frame.y_ticks, _data(thin))


def running_mean(values: Values, window: int) -> list[float | None]:
    """The mean of the last `window` known values; None if a value is missing."""
    means: list[float | None] = []
    last: list[float] = []
    for value in values:
        if value is not None:
            last = [*last, value][-max(window, 1) :]
        means.append(None if value is None else math.fsum(last) / len(last))
    return means


def thinned(curve: Curve) -> Curve:
    """At most COLUMNS points: neighbors become their mean, and the band keeps its extremes."""
    size = math.ceil(len(curve.steps) / COLUMNS)
    if size == 1:
        return curve
    return Curve(
        run=curve.run,
        label=curve.label,
        steps=[part[-1] for part in _parts(curve.steps, size)],
        values=[_over(part, lambda known: math.fsum(known) / len(known)) for part in _parts(curve.values, size)],
        dashed=curve.dashed,
        low=[_over(part, min) for part in _parts(curve.low, size)],
        high=[_over(part, max) for part in _parts(curve.high, size)],
    )


def _parts(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _over(part: Values, summary: Any) -> float | None:
    known = [value for value in part if value is not None]
    return summary(known) if known else None


def _data(drawn: Sequence[Curve]) -> dict[str, Any]:
    fields = ("run", "label", "steps", "values", "low", "high")
    lines = [{name: getattr(curve, name) for name in fields} for curve in drawn]
    first, last = _domain([step for curve in drawn for step in curve.steps])
    return {"x0": LEFT, "x1": WIDTH - RIGHT, "first": first, "last": last, "lines": lines}


def _domain(steps: Sequence[int]) -> tuple[int, int]:
    """A range with a width, even for a single step."""
    return min(steps), max(*steps, min(steps) + 1)


def _ticks(low: float, high: float, count: int, whole: bool = False) -> tuple[list[float], float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them, and what lies between two."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    every = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        every = max(round(every), 1)
    first, last = math.floor(low / every + 1e-9), math.ceil(high / every - 1e-9)
    return [i * every for i in range(first, last + 1)], every


def tick_text(value: float, every: float) -> str:
    """With the digits that distinguish it from a tick `every` away."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit and every >= limit / 1000:
            return f"{value / (1e3 if suffix == 'k' else limit):.6g}{suffix}"
    if value == 0:
        return "0"
    decimals = max(0, -math.floor(math.log10(every) + 1e-9))
    if decimals > 3:
        digits = max(math.floor(math.log10(abs(value)) + 1e-9) + decimals, 0)
        return f"{value:.{digits}e}".replace("e-0", "e-")
    return f"{value:.{decimals}f}"
