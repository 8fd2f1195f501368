"""The geometry of the report's charts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longgrpo.report import charts
from longgrpo.report.charts import Curve, curves, running_mean, stacked, thinned

numbers = st.floats(-1e9, 1e9).map(lambda x: float(f"{x:.6g}"))
values = st.lists(st.none() | numbers, min_size=1, max_size=900)


def curve(points, **others):
    return Curve(0, "mean", range(1, len(points) + 1), points, **others)


def points_of(d):
    """The coordinates of a path's M and L."""
    return [tuple(map(float, point.split())) for point in d.replace("M", "L").replace("Z", "").split("L")[1:]]


@settings(deadline=None)
@given(values)
def test_everything_stays_within_the_frame_and_between_its_ticks(points):
    drawing = curves([curve(points)])
    if all(value is None for value in points):
        assert drawing is None
        return
    ys = [y for y, _ in drawing.y_ticks]
    assert len(ys) >= 2
    assert (ys[0], ys[-1]) == (charts.HEIGHT - charts.BOTTOM, pytest.approx(charts.TOP))
    assert len({text for _, text in drawing.y_ticks}) == len(ys)  # no two ticks read alike
    for shape in drawing.shapes:
        for x, y in points_of(shape.d):
            assert charts.LEFT - 0.1 <= x <= charts.WIDTH - charts.RIGHT + 0.1
            assert charts.TOP - 0.1 <= y <= charts.HEIGHT - charts.BOTTOM + 0.1


@settings(deadline=None)
@given(numbers, numbers)
def test_ticks_say_where_they_stand(first, second):
    drawing = curves([curve([first, second])])
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}
    (y0, low), *_, (y1, high) = [
        (y, float(text.rstrip("kMG")) * scale.get(text[-1], 1.0)) for y, text in drawing.y_ticks
    ]
    for (_, y, _), value in zip(drawing.dots, (first, second), strict=True):
        assert low + (y - y0) / (y1 - y0) * (high - low) == pytest.approx(value, abs=(high - low) / 100)


@settings(deadline=None)
@given(values)
def test_a_long_curve_keeps_its_mean_and_its_extremes(points):
    thin = thinned(curve(points, low=points, high=points))
    known = [value for value in points if value is not None]
    assert len(thin.steps) == len(thin.values) <= charts.COLUMNS
    assert thin.steps[-1] == len(points)
    if known:
        assert min(value for value in thin.low if value is not None) == min(known)
        assert max(value for value in thin.high if value is not None) == max(known)
    if None not in points and len(points) % charts.COLUMNS == 0:
        mean = math.fsum(thin.values) / len(thin.values)
        assert mean == pytest.approx(math.fsum(points) / len(points), abs=1e-3)


def test_a_gap_breaks_the_line():
    (line,) = curves([curve([1.0, None, 2.0, 3.0])]).shapes
    assert line.d.count("M") == 2
    assert line.d.count("L") == 1


def test_the_running_mean_is_of_the_last_known_values():
    assert running_mean([1.0, None, 2.0, 6.0, 7.0], 2) == [1.0, None, 1.5, 4.0, 6.5]


def test_layers_lie_on_each_other():
    drawing = stacked([1, 2], {"a": [1.0, 2.0], "b": [3.0, 1.0]}, run=0)
    lower, upper = (points_of(shape.d) for shape in drawing.shapes)
    assert lower[:2] == upper[:1:-1]  # b's lower edge, drawn backwards, is a's upper one
    heights = [(charts.HEIGHT - charts.BOTTOM - y) for _, y in upper[:2]]
    assert heights[0] / heights[1] == pytest.approx(4 / 3, rel=0.01)
