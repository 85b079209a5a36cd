"""Benchmarks and curves as inline SVG, drawn from flat records: no script, no network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from conformance.report import Bench

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 42
SERIES = 6  # colours in the style sheet; further series reuse them with another dash


@dataclass(frozen=True)
class Plot:
    """One figure: its heading, the drawing, the legend's names, and the numbers as a table."""

    title: str
    svg: str
    providers: tuple[str, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic map from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """An axis over the values, logarithmic when they are positive and span a decade."""
        low, high = min(values), max(values)
        log = low > 0 and high / low >= 10
        if not log:
            low = min(low, 0.0) if low < high / 2 else low
        if low == high:
            low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
        return cls(low, high, start, end, log)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Four to eight round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            steps = (1, 2, 5) if last - first < 2 else (1,)
            found = [10.0**e * s for e in range(first - 1, last + 1) for s in steps]
            return [v for v in found if self.low <= v <= self.high * 1.0001]
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def plots(records: Iterable[Bench]) -> list[Plot]:
    """A figure for each kernel, mode, metric and x with finite records, in a fixed order."""
    groups: dict[tuple[str, str, str, str, str], list[Bench]] = {}
    for record in records:
        if all(math.isfinite(v) for v in (record.x_value, record.median, record.p20, record.p80)):
            key = (record.kernel, record.mode, record.metric, record.unit, record.x_name)
            groups.setdefault(key, []).append(record)
    return [_plot(key, groups[key]) for key in sorted(groups)]


def _plot(key: tuple[str, str, str, str, str], records: Sequence[Bench]) -> Plot:
    kernel, mode, metric, unit, x_name = key
    providers = tuple(sorted({record.provider for record in records}))
    xs = sorted({record.x_value for record in records})
    value = {(r.provider, r.x_value): f"{r.median:.4g}" for r in records}
    title = f"{kernel} · {mode} · {metric}"
    return Plot(
        title,
        _svg(records, providers, f"{x_name}", f"{metric} ({unit})" if unit else metric, title),
        providers,
        (x_name, *providers),
        tuple((f"{x:g}", *(value.get((p, x), "") for p in providers)) for x in xs),
    )


def _svg(
    records: Sequence[Bench], providers: Sequence[str], x_name: str, y_name: str, title: str
) -> str:
    x_axis = Axis.over([r.x_value for r in records], LEFT, WIDTH - RIGHT)
    spread = [v for r in records for v in (r.median, r.p20, r.p80)]
    y_axis = Axis.over(spread, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_frame(x_axis, y_axis, x_name, y_name),
    ]
    for index, provider in enumerate(providers):
        own = sorted((r for r in records if r.provider == provider), key=lambda r: r.x_value)
        parts += _line(own, index, x_axis, y_axis)
    return "".join([*parts, "</svg>"])


def _frame(x_axis: Axis, y_axis: Axis, x_name: str, y_name: str) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_axis.ticks():
        x = x_axis(tick)
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
                 f"{escape(x_name)}</text>")  # fmt: skip
    parts.append(f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">'
                 f"{escape(y_name)}</text>")  # fmt: skip
    return parts


def _line(records: Sequence[Bench], index: int, x_axis: Axis, y_axis: Axis) -> list[str]:
    """The band from p20 to p80, the line of medians, and a mark with its value on hover."""
    style = f"s{index % SERIES}" + (" again" if index >= SERIES else "")
    points = [(x_axis(r.x_value), y_axis(r.median)) for r in records]
    upper = [f"{x_axis(r.x_value):.1f},{y_axis(r.p80):.1f}" for r in records]
    lower = [f"{x_axis(r.x_value):.1f},{y_axis(r.p20):.1f}" for r in reversed(records)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [
        f'<polygon class="band {style}" points="{" ".join(upper + lower)}"/>',
        f'<polyline class="line {style}" points="{path}"/>',
    ]
    for record, (x, y) in zip(records, points, strict=True):
        text = escape(f"{record.provider}: {record.median:.4g} {record.unit} at {record.x_value:g}")
        parts.append(f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3.4">'
                     f"<title>{text}</title></circle>")  # fmt: skip
    return parts
