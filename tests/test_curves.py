"""Curves that checks draw: in the report, thinned, in the page, and never taken for timings."""

from __future__ import annotations

from dataclasses import replace

from conformance.drift import bench_drifts
from conformance.plots import plots
from conformance.recording import _points
from conformance.report import Report

FALLING = [5.0 / (step + 1) for step in range(500)]


def drawn(values: list[float], every: int = 1) -> Report:
    points = [((i + 1) * every, value) for i, value in enumerate(values)]
    curves = [("captions", "loss", name, points) for name in ("a", "b")]
    return Report("reference", bench=tuple(_points(curves)))


def test_a_long_curve_is_thinned_and_ends_where_it_ends() -> None:
    found = [b for b in drawn(FALLING).bench if b.provider == "a"]
    assert 30 <= len(found) <= 40
    assert found[-1].x_value > 480 and found[-1].median < 0.011
    assert [b.x_value for b in drawn([1.0, 2.0], every=10).bench][:2] == [10.0, 20.0]


def test_series_share_a_figure() -> None:
    (figure,) = plots(drawn(FALLING).bench)
    assert figure.providers == ("a", "b") and "<polyline" in figure.svg


def test_a_curve_is_no_timing() -> None:
    before, after = drawn(FALLING), drawn([value * 3 for value in FALLING])
    assert not bench_drifts(before, after)
    timed = [replace(b, peer="") for b in after.bench], [replace(b, peer="") for b in before.bench]
    assert bench_drifts(*(replace(before, bench=tuple(b)) for b in reversed(timed)))
