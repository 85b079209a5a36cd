"""What the command line does with reports: read them, show them, compare them, write the result."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from conformance.compare import Comparison, compare
from conformance.report import Report, read, write_atomically


def show(paths: Sequence[Path], html: Path | None, markdown: bool) -> str:
    """The reports as text to print; with `html` the page is written too.

    Raises ReportError for a report that cannot be read or a place that cannot be written.
    """
    reports = [read(path) for path in paths]
    text = ""
    if html is not None:
        from conformance.page import render

        write_atomically(html, render(reports))
        text = "" if markdown else f"{html}\n"
    if markdown:
        from conformance.markdown import to_markdown

        return to_markdown(reports)
    return text or "\n\n".join(matrix(report) for report in reports) + "\n"


def matrix(report: Report) -> str:
    """The short matrix and the failures, as a terminal shows them."""
    from conformance.terminal import failure_lines, matrix_lines

    wide = (sys.stdout.encoding or "ascii").lower().startswith("utf")
    return "\n".join([*matrix_lines(report, unicode=wide), *failure_lines(report)])


def compared(
    before: Path, after: Path, form: str, annotations: Path | None = None
) -> tuple[str, int]:
    """Two reports compared: the text in the wanted form, and the exit status.

    Raises InputError for reports that cannot be read or compared.
    """
    from conformance.annotations import SHIPPED, read_annotations
    from conformance.schema_snapshot import committed_difference

    expected = read_annotations(annotations or SHIPPED)
    old, new = read(before), read(after)
    return rendered(compare(old, new, expected, committed_difference(old, new)), form)


def rendered(comparison: Comparison, form: str) -> tuple[str, int]:
    """A comparison in one of the forms, and its exit status."""
    from conformance.compare_output import FORMATS

    return FORMATS[form](comparison), comparison.exit


def put(text: str, out: Path | None) -> None:
    """Print a text, or write it to a file in one step."""
    if out is None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        write_atomically(out, text)
        print(out)
