"""The curves that the report's page gets: thinned, rounded, and whether they say anything."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longgrpo.report import curves
from longgrpo.report.curves import Curve, drawn, thinned

numbers = st.floats(-1e9, 1e9).map(lambda x: float(f"{x:.6g}"))
values = st.lists(st.none() | numbers, min_size=1, max_size=900)


def curve(points, **others):
    return Curve(0, "loss", "mean", range(1, len(points) + 1), points, **others)


@settings(deadline=None)
@given(values, st.integers(1, 50))
def test_a_long_curve_keeps_its_mean_and_its_extremes(points, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "POINTS", most)
        thin = thinned(curve(points, low=points, high=points))
    known = [value for value in points if value is not None]
    assert len(thin.steps) == len(thin.values) <= most
    assert thin.steps[-1] == len(points)
    if known:
        assert min(value for value in thin.low if value is not None) == min(known)
        assert max(value for value in thin.high if value is not None) == max(known)
    if None not in points and len(points) % most == 0:
        mean = math.fsum(thin.values) / len(thin.values)
        assert mean == pytest.approx(math.fsum(points) / len(points), abs=1e-3)


@settings(deadline=None)
@given(values)
def test_a_short_curve_is_drawn_as_it_is(points):
    chart = drawn([curve(points)])
    if all(value is None for value in points):
        assert chart is None
    else:
        (line,) = chart["lines"]
        assert (line["steps"], line["values"]) == (list(range(1, len(points) + 1)), points)


@pytest.mark.parametrize(
    ("points", "flat"), [([1.0], False), ([1.0, 1.0], True), ([1.0, 1.5], False), ([1.0, None, 1.0], False)]
)
def test_a_curve_is_flat_if_it_says_the_same_at_several_steps(points, flat):
    assert curve(points).flat is flat
    assert not curve(points, low=[-1.0] * len(points), high=points).flat
