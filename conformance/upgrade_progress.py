"""An upgrade's progress on the terminal, on stderr, so that stdout holds the verdict alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from conformance.compare import Comparison
from conformance.suite_run import Run
from conformance.upgrade import Request, Upgrade


def judge(request: Request) -> Comparison:
    """Judge an upgrade, showing what goes on. Raises InputError."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def say(text: str) -> None:
            bars.console.print(escape(text))

        def progress(runs: Sequence[Run]) -> None:
            for run in runs:
                key = str(run.folder)
                if key not in tasks:
                    words = f"{run.label}{' (cached)' if run.cached else ''}"
                    tasks[key] = bars.add_task(escape(words), total=100)
                bars.update(tasks[key], completed=run.percent)

        return Upgrade(request, say, progress).judge()
