"""Compare a report with the committed one of `stable`: `python ci/against_stable.py REPORT.json`.

Exit status 1 only when something broke. Without a committed report there is nothing to compare
with, which is said, and the run's own failures decide.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
STABLE = ROOT / "reports" / "stable.json"
sys.path.insert(0, str(ROOT))
BAD = ("failed", "error", "timeout", "xpassed")


def main(arguments: list[str]) -> int:
    """Print the comparison; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python ci/against_stable.py REPORT.json", file=sys.stderr)
        return 2
    from conformance.cli import run

    if STABLE.exists():
        return run(["compare", str(STABLE), arguments[0]])
    print("no reports/stable.json is committed: nothing to compare with")
    try:
        rows = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))["results"]
        bad = [row["case_id"] for row in rows if row["verdict"] in BAD]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{arguments[0]}: no readable report: {error}", file=sys.stderr)
        return 2
    print("\n".join(bad[:50]))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
