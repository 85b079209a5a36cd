"""Compare a report with the committed one of `stable`: `python ci/against_stable.py REPORT.json`.

Exit status 1 only when something broke. A run that was narrowed (`-m gemma4`, `--case`) is compared
on the cases that it has. Where there is no committed report to compare with, because none is or
because it is of another implementation, that is said and the run's own failures decide.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conformance.annotations import read_annotations
from conformance.compare import compare
from conformance.errors import InputError
from conformance.records import rendered
from conformance.report import BAD, Report, one_line, read
from conformance.schema_snapshot import committed_difference

STABLE = Path(__file__).parent.parent / "reports" / "stable.json"


def alike(stable: Report, report: Report) -> Report:
    """The stable report as if it had been narrowed like the other one."""
    if not report.selection:
        return stable
    asked = report.by_id()
    rows = tuple(row for row in stable.rows if row.case_id in asked)
    return replace(stable, rows=rows, selection=report.selection)


def against(report: Report) -> tuple[str, int]:
    """What to print, and the exit status. Raises InputError."""
    if not STABLE.exists():
        return alone(report, "no reports/stable.json is committed")
    stable = read(STABLE)
    if report.implementation != stable.implementation:
        return alone(report, f"reports/stable.json judges {stable.implementation}")
    narrowed = alike(stable, report)
    if not narrowed.rows:
        return alone(report, "reports/stable.json has none of these cases")
    schema = committed_difference(narrowed, report)
    text, status = rendered(compare(narrowed, report, read_annotations(), schema), "text")
    if report.selection:
        count = f"{len(narrowed.rows)} of its {len(stable.rows)} cases"
        text += f"\ncompared with {count}: the run was narrowed by {one_line(report.selection)}\n"
    return text, max(status, int(bool(report.uncollected)))


def alone(report: Report, why: str) -> tuple[str, int]:
    """The verdict of a run that nothing can be held against."""
    bad = [f"{row.verdict}: {row.case_id}" for row in report.rows if row.verdict in BAD]
    lost = [f"could not import {text}" for text in report.uncollected]
    lines = [f"{why}: nothing to compare with", *lost, *bad[:50]]
    return "\n".join(lines) + "\n", int(bool(bad or lost))


def main(arguments: list[str]) -> int:
    """Print the comparison; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python ci/against_stable.py REPORT.json", file=sys.stderr)
        return 2
    try:
        text, status = against(read(arguments[0]))
    except InputError as error:
        print(f"against_stable: {one_line(str(error))}", file=sys.stderr)
        return 2
    print(text, end="")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
