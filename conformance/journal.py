"""A run that may be interrupted: each finished case is written down, and not run a second time.

A pytest plugin for the runs of `conformance upgrade` (`-p conformance.journal --report=FILE`). The
journal lies beside the report, one row a line, and goes when the report is written. A run whose
parent has died ends at the next case, so that nothing goes on unseen.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from conformance.plugin import CASE
from conformance.report import VERDICTS

UNFINISHED = (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)


def journal_of(report: Path) -> Path:
    """Where the journal of a report lies."""
    return report.with_name(report.name + ".journal")


def read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of an interrupted run by case id; a line that was cut off does not count."""
    found: dict[str, dict[str, Any]] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        try:
            row = json.loads(line)
            if row["verdict"] in VERDICTS:
                found[row["case_id"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return found


class Journal:
    """Writes rows down as they come; the recorder keeps them in memory only."""

    def __init__(self, config: pytest.Config, report: Path) -> None:
        self.config = config
        self.report = report
        self.path = journal_of(report)
        self.parent = os.getppid()

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The recorder's rows."""
        rows: dict[str, dict[str, Any]] = self.config.pluginmanager.getplugin(
            "conformance-recorder"
        ).rows
        return rows

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what an interrupted run has done."""
        done = read_journal(self.path)
        ids = [item.stash[CASE].id if CASE in item.stash else "" for item in items]
        again = [item for item, name in zip(items, ids, strict=True) if name not in done]
        if len(again) < len(items):
            self.rows.update({name: done[name] for name in ids if name in done})
            self.config.hook.pytest_deselected(
                items=[item for item, name in zip(items, ids, strict=True) if name in done]
            )
            items[:] = again

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the row of a case that is over."""
        row = self.rows.get(str(dict(report.user_properties).get("case_id")))
        if report.when != "teardown" or row is None or "verdict" not in row:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if os.getppid() != self.parent:
            os.killpg(0, signal.SIGTERM)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Whole: the journal goes. Interrupted: the half report goes."""
        unfinished = session.exitstatus in UNFINISHED
        (self.report if unfinished else self.path).unlink(missing_ok=True)


def pytest_configure(config: pytest.Config) -> None:
    """Take part where a report is asked for."""
    report = config.getoption("report")
    if report:
        config.pluginmanager.register(Journal(config, Path(report)), "conformance-journal")
