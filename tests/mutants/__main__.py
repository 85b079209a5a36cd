"""`python -m tests.mutants`: the published table of bugs and the checks that kill them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.mutants import Mutant, load

HEADER = (
    "| Check | Bug | What goes wrong | Killed in the case | Thread |",
    "|---|---|---|---|---|",
)
_THREAD = re.compile(r"https://github\.com/[^/]+/([^/]+)/(?:issues|pull)/(\d+)$")


def thread(issue: str) -> str:
    """A thread as markdown: a link with a short name where it is an address."""
    found = _THREAD.match(issue)
    if found:
        return f"[{found[1]}#{found[2]}]({issue})"
    if issue.startswith("https://"):
        return f"<{issue}>"
    return issue


def row(mutant: Mutant) -> str:
    """One mutant as a row of the table."""
    symptom = mutant.symptom.replace("|", r"\|")
    cells = (mutant.killed_by, mutant.bug, symptom, f"`{mutant.case}`", thread(mutant.issue))
    return f"| {' | '.join(cells)} |"


def table(mutants: Iterable[Mutant]) -> str:
    """The markdown table, by check, mutants of one check in the order of their definition."""
    rows = [row(mutant) for mutant in sorted(mutants, key=lambda m: m.killed_by)]
    return "\n".join((*HEADER, *rows))


if __name__ == "__main__":
    print(table(load()))
