"""Collects what became of each case, and writes the report where the run ends."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from conformance import asked

if TYPE_CHECKING:
    from conformance.plugin import Run
    from conformance.report import Bench, Report


CRASHED = "???"  # xdist's name for the phase in which a worker died
IN_BRACKETS = re.compile(r"\[([^\[\]/]+(?:/[^\[\]/@]+){3})(?:@[^\]]*)?\]$")


class Recorder:
    """Collects rows where the reports arrive: the only process, or xdist's controller."""

    def __init__(self, config: pytest.Config, run: pytest.StashKey[Run]) -> None:
        self.config = config
        self.run = run
        self.rows: dict[str, dict[str, Any]] = {}
        self.curves: list[Any] = []
        self.stale: str | None = None
        self.uncollected: dict[str, str] = {}
        from conformance.report import now

        self.started = now()
        self.clock = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Fold one phase of a case into its row."""
        properties = dict(report.user_properties)
        if report.when == CRASHED:
            properties = _crash(report)
        case_id = properties.get("case_id")
        if not isinstance(case_id, str):
            return
        row = self.rows.setdefault(case_id, {"case_id": case_id, "duration": 0.0})
        row["duration"] += report.duration
        drawn: Any = properties.get("curves", [])
        self.curves += drawn
        row["measured"] = properties.get("measured", row.get("measured", {}))
        verdict = _verdict(report, properties)
        if verdict and row.get("verdict") not in ("failed", "error", "timeout", "xpassed"):
            row["verdict"] = verdict
            row["reason"] = properties.get("reason") or _skip_reason(report)
            for name in ("expected", "issue", "message", "where"):
                row[name] = properties.get(name, "")
            row["repeat"] = next((t for n, t in report.sections if n == "repeat with"), "")

    def report(self, status: int) -> Report:
        """The run's record so far."""
        from conformance.report import Report, Row, hardware, versions

        run = self.config.stash.get(self.run, None)
        device = self.config.getoption("device")
        return Report(
            implementation=run.loaded.name if run else self.config.getoption("impl"),
            rows=tuple(Row(**row) for row in self.rows.values()),
            versions=versions(),
            hardware=hardware(device, _device_name(device)),
            matrix=self.config.getoption("matrix"),
            started=self.started,
            selection=selection(self.config),
            wall_s=time.monotonic() - self.clock,
            exit=status,
            checks=run.checks if run else {},
            uncollected=tuple(sorted(self.uncollected.values())),
            bench=tuple(_points(self.curves)),
        )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module of checks that cannot be imported: its cases are lost, not absent."""
        if report.failed and "checks" in report.nodeid:
            lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
            said = next((line[1:] for line in lines[::-1] if line.startswith("E ")), lines[-1])
            name = report.nodeid.rpartition("/")[2]
            self.uncollected[report.nodeid] = f"{name}: {said.strip()}"

    @pytest.hookimpl(optionalhook=True)  # xdist's own, which a stranger may not have
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker's stale expectations are the run's."""
        output = getattr(node, "workeroutput", None) or {}
        self.stale = self.stale or output.get("conformance_stale")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report; a stale expectation makes the run fail."""
        if self.stale:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        path = self.config.getoption("report")
        if path and self.rows:
            from conformance.report import ReportError, write

            try:
                write(self.report(int(session.exitstatus)), Path(path))
            except ReportError as error:
                self.stale = self.stale or str(error)
                session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        """The short matrix, and what was stale or selected nothing."""
        if self.stale:
            terminalreporter.write_line(f"ERROR: {self.stale}", red=True)
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and asked.for_checks(self.config):
            text = f"no case matches {selection(self.config) or 'the arguments'}"
            terminalreporter.write_line(
                f"ERROR: {text}; a case id is check/model/setting/strategy, and `conformance"
                " catalogue` lists the checks",
                red=True,
            )
        if self.rows:
            from conformance.terminal import matrix_lines

            terminalreporter.section("conformance")
            for line in matrix_lines(self.report(0)):
                terminalreporter.write_line(line)


def selection(config: pytest.Config) -> str:
    """What narrows a run to a part of its matrix: two runs compare if it is the same."""
    flags = (("-m", "markexpr"), ("-k", "keyword"), ("--shard", "shard"))
    found = [f"{flag} {text!r}" for flag, name in flags if (text := config.getoption(name, ""))]
    for flag, name in (("--case", "case"), ("--deselect", "deselect")):
        found += [f"{flag} {text!r}" for text in config.getoption(name, None) or ()]
    names = [re.split(r"[/\\]", argument)[-1] for argument in config.args]
    return " ".join([*found, *(name for name in names if "test_" in name)])


def _crash(report: pytest.TestReport) -> dict[str, Any]:
    """What is known of a case whose worker died: its id, which pytest made the item's."""
    found = IN_BRACKETS.search(report.nodeid)
    if found is None or "checks/" not in report.nodeid:
        return {}
    return {"case_id": found[1], "message": str(report.longrepr), "exception": "worker crashed"}


def _points(curves: Iterable[Any]) -> Iterator[Bench]:
    """Each curve thinned to forty points. A series is its own peer: no comparison times it."""
    from conformance.report import Bench

    for figure, metric, series, points in curves:
        stride = max(1, -(-len(points) // 40))
        for step, value in points[stride - 1 :: stride]:
            yield Bench(
                kernel=figure, provider=series, mode="training", metric=metric, unit="",
                x_name="step", x_value=float(step), median=value, p20=value, p80=value, peer=series,
            )  # fmt: skip


def _device_name(device: str) -> str:
    if device == "cpu":
        return ""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def _verdict(report: pytest.TestReport, properties: dict[str, Any]) -> str | None:
    if report.skipped:
        if hasattr(report, "wasxfail"):
            return "xfailed"
        return str(properties.get("verdict", "unavailable"))
    if report.passed:
        return "passed" if report.when == "call" else None
    if str(report.longrepr).startswith("[XPASS(strict)]"):
        return "xpassed"
    if properties.get("exception") == "RanksTimeout":
        return "timeout"
    return "failed" if properties.get("assertion") and report.when == "call" else "error"


def _skip_reason(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        text = str(report.longrepr[2]).removeprefix("Skipped: ")
        return text.partition(": ")[2] or text
    return ""
