"""The matrix at the end of a run, as plain lines for a terminal or a log."""

from __future__ import annotations

from collections.abc import Sequence

from conformance.grid import ASCII, GLYPHS, Grid, grid, headline, summary
from conformance.report import BAD, Report, Row, one_line


def matrix_lines(report: Report, width: int = 100, unicode: bool = True) -> list[str]:
    """The model × setting/strategy matrix of a report, a legend, and what failed.

    width: columns of the terminal; columns that do not fit go into a further block.
    unicode: False writes ASCII marks.
    """
    glyphs = GLYPHS if unicode else ASCII
    table = grid(report)
    lines: list[str] = []
    label = max([10, *map(len, table.models)])
    for title, columns in (("settings", table.settings), ("strategies", table.strategies)):
        for block in _blocks(columns, width - label - 1):
            lines += _block_lines(table, block, label, glyphs, title)
            lines.append("")
    used = [verdict for verdict in glyphs if report.counts.get(verdict)]
    if used:
        lines.append("   ".join(f"{glyphs[v]} {v} {report.counts[v]}" for v in used))
    lines.append(one_line(headline(report), 300))
    return lines


def failure_lines(report: Report, limit: int = 20) -> list[str]:
    """Each case that makes the run fail: its id, what went wrong, and how to repeat it."""
    bad = [row for row in sorted(report.rows, key=lambda r: r.case_id) if row.verdict in BAD]
    lines: list[str] = []
    for row in bad[:limit]:
        lines += _failure(row)
    if len(bad) > limit:
        lines.append(f"… and {len(bad) - limit} more; see the report")
    return lines


def _failure(row: Row) -> list[str]:
    lines = [f"{row.verdict} {row.case_id}", f"    {one_line(row.message or row.reason, 300)}"]
    if row.where:
        lines.append(f"    at {row.where}")
    if row.repeat:
        lines.append(f"    repeat: {row.repeat}")
    return lines


def short(column: str) -> str:
    """A column's heading: the first word, then the initials (`ckpt-nonreentrant` → `ckpt-n`)."""
    first, *rest = column.split("-")
    return "-".join([first, "".join(word[:1] for word in rest)]) if rest else column


def _blocks(columns: Sequence[str], room: int) -> list[list[str]]:
    """The columns dealt into rows of headings that fit the room."""
    blocks: list[list[str]] = []
    used = room + 1
    for column in columns:
        size = len(short(column)) + 1
        if used + size > room:
            blocks.append([])
            used = 0
        blocks[-1].append(column)
        used += size
    return blocks


def _block_lines(
    table: Grid, columns: Sequence[str], label: int, glyphs: dict[str, str], title: str
) -> list[str]:
    heads = [short(column) for column in columns]
    lines = [f"{title[:label]:<{label}} " + " ".join(heads)]
    for model in table.models:
        cells = [table.cell(model, column) for column in columns]
        if not any(cell.rows for cell in cells):
            continue
        marks = (
            _mark(glyphs.get(cell.verdict, " "), cell.counts.get(cell.verdict, 0), len(head))
            for cell, head in zip(cells, heads, strict=True)
        )
        lines.append(f"{model:<{label}} " + " ".join(marks))
    return lines


def _mark(glyph: str, count: int, width: int) -> str:
    text = f"{glyph}{count}" if count > 1 and len(f"{glyph}{count}") <= width else glyph
    return f"{text:^{width}}"


def totals_line(report: Report) -> str:
    """`reference: 2980 passed, 12 unsupported in 118.2 s`."""
    return one_line(f"{report.implementation}: {summary(report.counts)} in {report.wall_s:.1f} s")
