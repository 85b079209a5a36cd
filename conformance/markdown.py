"""A report as markdown, for a CI job's summary. Every string of the report is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from conformance.grid import GLYPHS, grid, headline, summary, worst
from conformance.report import BAD, VERDICTS, Report, Row, one_line

_SPECIAL = frozenset("\\`*_{}[]()<>#!|~&@\"'")
_PLAIN = re.compile(r"[A-Za-z0-9.+-]+(_[A-Za-z0-9.+-]+)*")
MAX_FAILURES = 50


def escape(text: str, limit: int = 300) -> str:
    """Text that markdown and HTML show as it is: no link, mention, code, table break or markup."""
    line = one_line(text, limit)
    if _PLAIN.fullmatch(line):
        return line
    return "".join(f"&#{ord(c)};" if c in _SPECIAL else c for c in line)


def link(url: str, text: str) -> str:
    """A link where the address is a plain web address, else the text alone."""
    if safe_url(url):
        return f"[{escape(text)}]({url})"
    return escape(text)


def safe_url(url: str) -> bool:
    """Whether an address may become a link: http(s), without characters that end one."""
    return (
        url.startswith(("https://", "http://"))
        and url.isascii()
        and not set(url) & set(" \"'<>()[]\\`{}|^")
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table of already escaped cells."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def to_markdown(reports: Sequence[Report]) -> str:
    """A summary of one or several reports: counts, the matrix of each, what failed."""
    lines = ["## Conformance", ""]
    used = [v for v in VERDICTS if any(report.counts.get(v) for report in reports)]
    rows = [
        [escape(report.implementation), *(str(report.counts.get(v, 0)) for v in used)]
        for report in reports
    ]
    lines += table(["implementation", *(f"{GLYPHS[v]} {v}" for v in used)], rows)
    for report in reports:
        lines += ["", f"### {escape(report.implementation)}", "", escape(headline(report)), ""]
        lines += _matrix(report)
        lines += _failures(report)
    return "\n".join(lines) + "\n"


def _matrix(report: Report) -> list[str]:
    cells = grid(report)
    rows = [
        [escape(model), *(_cell(cells.cell(model, column).counts) for column in cells.columns)]
        for model in cells.models
    ]
    return table(["model", *map(escape, cells.columns)], rows)


def _cell(counts: Mapping[str, int]) -> str:
    verdict = worst(counts)
    return f"{GLYPHS[verdict]} {counts[verdict]}" if verdict else ""


def _failures(report: Report) -> list[str]:
    bad = [row for row in sorted(report.rows, key=lambda r: r.case_id) if row.verdict in BAD]
    if not bad:
        return []
    lines = ["", f"<details open><summary>{summary_of(bad)}</summary>", ""]
    lines += table(["case", "verdict", "what"], ([_id(r), r.verdict, escape(r.message)]
                                                 for r in bad[:MAX_FAILURES]))  # fmt: skip
    if len(bad) > MAX_FAILURES:
        lines += ["", f"and {len(bad) - MAX_FAILURES} more"]
    return [*lines, "", "</details>"]


def summary_of(rows: Sequence[Row]) -> str:
    """Counts of some rows, as text."""
    return summary({v: sum(row.verdict == v for row in rows) for v in VERDICTS})


def _id(row: Row) -> str:
    return f"`{row.case_id}`"  # a case id has no character that markdown knows
