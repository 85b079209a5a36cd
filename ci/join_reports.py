"""Join the reports of a run's shards: `python ci/join_reports.py --out ALL.json A.json B.json ...`.

All must be of one implementation, suite, stack and device; a case in two of them is an error.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conformance.errors import InputError
from conformance.report import Report, read, write


def joined(reports: Sequence[Report]) -> Report:
    """One report with the rows of all; walls add up, the worst exit status counts.

    Raises InputError for reports that do not belong together or share a case.
    """
    first = reports[0]
    for other in reports[1:]:
        for name in ("implementation", "versions", "matrix"):
            ours, theirs = getattr(first, name), getattr(other, name)
            if ours != theirs:
                raise InputError(f"the shards differ in {name}: {ours} and {theirs}")
        if first.hardware.get("device") != other.hardware.get("device"):
            raise InputError("the shards ran on different devices")
    rows = [row for report in reports for row in report.rows]
    twice = [case for case, count in Counter(row.case_id for row in rows).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]} lies in two shards ({len(twice)} cases in all)")
    return replace(
        first,
        rows=tuple(sorted(rows, key=lambda row: row.case_id)),
        bench=tuple(record for report in reports for record in report.bench),
        uncollected=tuple(sorted({text for report in reports for text in report.uncollected})),
        started=min(report.started for report in reports),
        selection="",
        wall_s=sum(report.wall_s for report in reports),
        exit=max(report.exit for report in reports),
        checks={name: claim for report in reports for name, claim in report.checks.items()},
    )


def main() -> int:
    """Join and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        write(joined([read(path) for path in arguments.reports]), arguments.out)
    except InputError as error:
        print(f"join_reports: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
