"""One self-contained HTML page of one or several reports: no network, no executed data.

Reports are untrusted: Jinja escapes every string, the embedded JSON cannot close its element, the
script only sets `textContent`, and the page's own policy allows no other script and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from conformance import __version__
from conformance.drift import is_error
from conformance.grid import GLYPHS, MEANING, WORST, Cell, grid, in_order, model_order, summary
from conformance.markdown import safe_url
from conformance.plots import plots
from conformance.report import BAD, VERDICTS, Report, Row
from conformance.settings import DIMENSIONS
from conformance.strategies import STRATEGIES

HERE = Path(__file__).parent
TEXTS = ("reason", "issue", "message", "where", "repeat")


@dataclass(frozen=True)
class Problem:
    """Cases of one implementation that share a verdict, a reason and an issue; `text` is the first
    case's."""

    implementation: str
    verdict: str
    text: str
    issue: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class CheckLine:
    """One check: its claim, and its cases by verdict for each implementation."""

    id: str
    claim: str
    motivation: str
    counts: tuple[Counter[str], ...]


def render(reports: Sequence[Report]) -> str:
    """The page of one report, or of several side by side, as HTML text."""
    grids = [grid(report) for report in reports]
    script = Markup((HERE / "page.js").read_text(encoding="utf-8"))
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            reports=reports,
            names=labels(reports),
            grids=grids,
            models=model_order(name for g in grids for name in g.models),
            settings=in_order(
                (c for g in grids for c in g.settings),
                ["default", *(t for v in DIMENSIONS.values() for t in v.values() if t)],
            ),
            strategies=in_order((c for g in grids for c in g.strategies), list(STRATEGIES)),
            tip=tip,
            problems=[
                p
                for name, r in zip(labels(reports), reports, strict=True)
                for p in problems(name, r)
            ],
            checks=check_lines(reports),
            plots=plots(record for report in reports for record in report.bench),
            data=Markup(embed(reports)),
            script=script,
            script_hash=script_hash(script),
            style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
            used=[v for v in VERDICTS if any(r.counts.get(v) for r in reports)],
        )
    )


@cache
def environment() -> Environment:
    """The template environment: everything escaped, an unknown name is an error."""
    found = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals.update(
        glyphs=GLYPHS,
        meaning=MEANING,
        verdicts=VERDICTS,
        bad=BAD,
        summary=summary,
        suite_version=__version__,
    )
    found.filters["safe_url"] = safe_url
    found.filters["number"] = number
    return found


def script_hash(script: str) -> str:
    """The hash by which the page's policy knows its own script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def labels(reports: Sequence[Report]) -> list[str]:
    """Names of the implementations; versions are added where two share a name."""
    names = [report.implementation for report in reports]
    if len(set(names)) == len(names):
        return names
    with_versions = [
        f"{name} ({', '.join(f'{p} {v}' for p, v in _moved(report, reports).items()) or 'same'})"
        for name, report in zip(names, reports, strict=True)
    ]
    return [
        f"{name} {index + 1}" if with_versions.count(name) > 1 else name
        for index, name in enumerate(with_versions)
    ]


def _moved(report: Report, reports: Sequence[Report]) -> dict[str, str]:
    """The versions in which the reports differ."""
    named = ("torch", "transformers", "peft", "accelerate")
    return {
        name: report.versions.get(name, "none")
        for name in named
        if len({other.versions.get(name) for other in reports}) > 1
    }


def number(value: float) -> str:
    """A measured number in four significant digits."""
    return f"{value:.4g}"


def tip(cell: Cell) -> str:
    """What a hover says of a cell: counts, the worst case's reason, its largest error."""
    lines = [cell.summary]
    if cell.rows and cell.verdict != "passed":
        row = next(row for row in cell.rows if row.verdict == cell.verdict)
        lines.append(row.message if row.verdict in BAD else row.reason)
    error = largest_error(cell)
    if error:
        lines.append(error)
    return "\n".join(line[:240] for line in lines if line)


def largest_error(cell: Cell) -> str:
    """The largest measured error among the cell's worst cases, with its tolerance if any."""
    best: tuple[float, str] = (-1.0, "")
    for row in cell.rows:
        if row.verdict != cell.verdict:
            continue
        tolerance = row.measured.get("tolerance")
        for name, value in row.measured.items():
            if is_error(name) and (value > best[0] or math.isnan(value)):
                held = f", tolerance {number(tolerance)}" if tolerance is not None else ""
                best = (value, f"largest error: {name} {number(value)}{held} ({row.check})")
    return best[1]


def problems(name: str, report: Report) -> list[Problem]:
    """What does not pass, grouped by verdict, check and reason: failures first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(report.rows, key=lambda r: r.case_id):
        if row.verdict != "passed":
            text = problem_text(row)
            failing = row.verdict in BAD
            words = "".join(c for c in text if not c.isdigit())[:60] if failing else text
            key = (row.verdict, row.check if failing else "", words, row.issue)
            groups.setdefault(key, []).append(row)
    found = [
        Problem(name, key[0], problem_text(rows[0]), key[3], tuple(rows))
        for key, rows in groups.items()
    ]
    return sorted(found, key=lambda p: (WORST.index(p.verdict), -len(p.rows), p.text))


def problem_text(row: Row) -> str:
    """What is wrong, without the case id that messages begin with."""
    text = row.message if row.verdict in BAD else row.reason
    return text.removeprefix(f"{row.case_id}: ")


def check_lines(reports: Sequence[Report]) -> list[CheckLine]:
    """Every check of the reports, with its claim where a report gives it."""
    described = {name: value for report in reports for name, value in report.checks.items()}
    counts: list[dict[str, Counter[str]]] = []
    for report in reports:
        own: dict[str, Counter[str]] = {}
        for row in report.rows:
            own.setdefault(row.check, Counter())[row.verdict] += 1
        counts.append(own)
    return [
        CheckLine(
            name, *described.get(name, ("", "")), tuple(c.get(name, Counter()) for c in counts)
        )
        for name in sorted({name for own in counts for name in own})
    ]


def embed(reports: Sequence[Report]) -> str:
    """The rows as JSON for the drill-down, strings interned, safe inside a script element."""
    strings: dict[str, int] = {"": 0}

    def intern(text: str) -> int:
        return strings.setdefault(text, len(strings))

    rows: list[list[Any]] = []
    for index, report in enumerate(reports):
        for row in sorted(report.rows, key=lambda r: r.case_id):
            measured = [[intern(n), _plain(v)] for n, v in sorted(row.measured.items())]
            texts = [intern(getattr(row, name)) for name in TEXTS]
            entry = [
                index,
                row.case_id,
                VERDICTS.index(row.verdict),
                row.duration,
                measured,
                *texts,
            ]
            rows.append(entry)
    data = {
        "names": labels(reports),
        "verdicts": VERDICTS,
        "glyphs": [GLYPHS[v] for v in VERDICTS],
        "claims": {c.id: c.claim for c in check_lines(reports)},
        "strings": list(strings),
        "rows": rows,
    }
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: float) -> float | str:
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)
