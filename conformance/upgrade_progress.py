"""An upgrade's progress on the terminal, on stderr, so that stdout holds the verdict alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from conformance.compare import Comparison
from conformance.suite_run import Run
from conformance.upgrade import Request, Upgrade


def judge(request: Request) -> Comparison:
    """Judge an upgrade, showing what goes on: bars on a terminal, lines elsewhere.

    Raises InputError.
    """
    console = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        console.print(escape(text), soft_wrap=True)

    if not console.is_terminal:
        return Upgrade(request, say, _Lines(say)).judge()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as bars:
        return Upgrade(request, say, _Bars(bars)).judge()


class _Lines:
    """A line when a run is done."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.done: set[str] = set()

    def __call__(self, runs: Sequence[Run]) -> None:
        for run in runs:
            key = str(run.folder)
            if run.percent == 100 and key not in self.done:
                self.done.add(key)
                self.say(f"{run.label}: {'from the cache' if run.cached else 'done'}")


class _Bars:
    """A bar for each run."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, runs: Sequence[Run]) -> None:
        for run in runs:
            key = str(run.folder)
            if key not in self.tasks:
                words = f"{run.label}{' (cached)' if run.cached else ''}"
                self.tasks[key] = self.bars.add_task(escape(words), total=100)
            self.bars.update(self.tasks[key], completed=run.percent)
