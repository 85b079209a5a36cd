"""The short matrix of a report: model rows × setting and strategy columns, one verdict a cell.

A case stands in the column of each of its setting's tokens (or in `default`), and, when it is
spread over ranks, in its strategy's column instead. So a column says how one choice fares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from conformance.report import VERDICTS, Report, Row
from conformance.settings import DIMENSIONS
from conformance.strategies import STRATEGIES

DEFAULT = "default"
SUITE = "(suite)"  # the row of checks that have no model
GLYPHS = {
    "passed": "✓",
    "failed": "✗",
    "error": "!",
    "timeout": "◷",
    "xfailed": "~",
    "xpassed": "?",
    "unsupported": "·",
    "unavailable": "○",
}
ASCII = GLYPHS | {"passed": "+", "failed": "F", "timeout": "T", "unsupported": ".",
                  "unavailable": "o"}  # fmt: skip
# The verdict a cell shows: the first of these that one of its cases has.
WORST = ("failed", "error", "timeout", "xpassed", "xfailed", "passed", "unavailable", "unsupported")
MEANING = {
    "passed": "the claim holds",
    "failed": "the claim does not hold",
    "error": "the check could not finish",
    "timeout": "no end within the deadline",
    "xfailed": "known failure of this implementation, with its issue",
    "xpassed": "listed as a known failure, yet passes",
    "unsupported": "the implementation does not claim it",
    "unavailable": "this machine lacks the hardware",
}


@dataclass(frozen=True)
class Cell:
    """The cases of one model in one column."""

    rows: tuple[Row, ...]

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Cases by verdict."""
        return Counter(row.verdict for row in self.rows)

    @property
    def verdict(self) -> str:
        """The worst verdict, or an empty string for a cell without cases."""
        return worst(self.counts)

    @property
    def summary(self) -> str:
        """`41 passed, 1 xfailed`."""
        return summary(self.counts)


EMPTY = Cell(())


@dataclass(frozen=True)
class Grid:
    """Cells by (model, column); both axes in a fixed order."""

    models: tuple[str, ...]
    settings: tuple[str, ...]
    strategies: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]

    @property
    def columns(self) -> tuple[str, ...]:
        """Settings, then strategies."""
        return self.settings + self.strategies

    def cell(self, model: str, column: str) -> Cell:
        """The cell, empty where no case lies."""
        return self.cells.get((model, column), EMPTY)


def worst(counts: Mapping[str, int]) -> str:
    """The worst verdict among the counted ones; empty when there is none."""
    return next((verdict for verdict in WORST if counts.get(verdict)), "")


def summary(counts: Mapping[str, int]) -> str:
    """Counts in the order of the verdicts, as text."""
    return ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts.get(v)) or "no cases"


def columns_of(row: Row) -> tuple[str, ...]:
    """The columns in which a case stands."""
    _, _, setting, strategy = row.parts
    if strategy not in ("single", "-"):
        return (strategy,)
    tokens = tuple(token for token in setting.split("+") if token != "-")
    return tokens or (DEFAULT,)


def grid(report: Report) -> Grid:
    """The matrix of one report."""
    cells: dict[tuple[str, str], list[Row]] = {}
    settings: set[str] = set()
    strategies: set[str] = set()
    for row in sorted(report.rows, key=lambda r: r.case_id):
        found = columns_of(row)
        spread = row.strategy not in ("single", "-")
        (strategies if spread else settings).update(found)
        for column in found:
            cells.setdefault((row.model if row.model != "-" else SUITE, column), []).append(row)
    return Grid(
        model_order(model for model, _ in cells),
        in_order(settings, [DEFAULT, *(t for v in DIMENSIONS.values() for t in v.values() if t)]),
        in_order(strategies, list(STRATEGIES)),
        {key: Cell(tuple(rows)) for key, rows in cells.items()},
    )


def model_order(names: Iterable[str]) -> tuple[str, ...]:
    """Models by name, the suite's own row last."""
    return tuple(sorted(set(names), key=lambda name: (name == SUITE, name)))


def in_order(names: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Names in the given order, unknown ones (of another suite version) last by alphabet."""
    place = {name: index for index, name in enumerate(known)}
    return tuple(sorted(set(names), key=lambda name: (place.get(name, len(place)), name)))


def headline(report: Report) -> str:
    """One sentence: who, how many of what, on what."""
    versions = report.versions
    stack = " · ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions
    )
    where = f"{report.hardware.get('device', '?')} ({report.hardware.get('name', '?')})"
    total = len(report.rows)
    return f"{report.implementation}: {summary(report.counts)} of {total} cases · {stack} · {where}"
