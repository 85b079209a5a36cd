"""One run of the suite in an environment: a child process, kept by exact versions and revision.

Its folder in the cache holds the report, pytest's output, and while it is not over the journal of
what it has done (`journal.py`) and a lock that the child holds as long as it lives.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from conformance.environments import Environment, cache_root, digest, on_disk
from conformance.errors import InputError
from conformance.report import Report, ReportError, one_line, read

HERE = Path(__file__).parent
NO_CASE = 5  # pytest's exit status
SOURCE_SUFFIXES = (".py", ".json", ".toml", ".safetensors")
# Modules that read reports or command lines: they change no verdict, so a cached run survives them.
READERS = frozenset(
    [
        "annotations",
        "attribution",
        "check_list",
        "cli",
        "cli_plan",
        "compare",
        "compare_output",
        "drift",
        "environments",
        "grid",
        "journal",
        "markdown",
        "new_adapter",
        "page",
        "plots",
        "records",
        "reproduce",
        "suite_run",
        "terminal",
        "upgrade",
        "upgrade_progress",
        "__main__",
    ]
)


@dataclass(frozen=True)
class Selection:
    """What to run: the implementation, a marker expression, the matrix, or single case ids."""

    impl: str = "transformers"
    markers: str = ""
    matrix: str = "default"
    cases: tuple[str, ...] = ()
    device: str = "cpu"

    def arguments(self) -> list[str]:
        """As pytest's options, each one word: pytest takes a separate value for a path."""
        found = [f"--impl={self.impl}", f"--matrix={self.matrix}", f"--device={self.device}"]
        if self.markers:
            found += ["-m", self.markers]
        return found + [f"--case={case}" for case in self.cases]


@cache
def suite_revision(impl: str) -> str:
    """A hash of the files that decide verdicts and, for a stranger's adapter, of its module."""
    parts = [HERE, HERE / "impl" if (HERE / "impl").exists() else HERE.parent / "impl"]
    state = hashlib.sha256()
    for folder in parts:
        for path in sorted(folder.rglob("*")):
            reader = path.parent == HERE and path.stem in READERS
            if path.suffix in SOURCE_SUFFIXES and path.is_file() and not reader:
                state.update(f"{path.relative_to(folder)}".encode())
                state.update(path.read_bytes())
    origin = _adapter_file(impl)
    if origin:
        state.update(origin.read_bytes())
    return state.hexdigest()[:20]


def _adapter_file(impl: str) -> Path | None:
    name = impl.partition(":")[0]
    if "." not in name and ":" not in impl:
        return None
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


@dataclass
class Run:
    """A run under way or done; `percent` is read off pytest's own progress. begin: starts the
    child, or returns None while another process is at the same run."""

    label: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    cached: bool = False
    percent: int = field(default=0)
    begin: Callable[[], subprocess.Popen[bytes] | None] = lambda: None

    @property
    def log(self) -> Path:
        """pytest's output."""
        return self.folder / "log.txt"

    @property
    def report(self) -> Path:
        """Where the report is, once the run is over."""
        return self.folder / "report.json"

    def poll(self) -> bool:
        """Whether it is done; refreshes `percent`."""
        if not self.cached and self.process is None:
            self.cached = self.report.exists()
            self.process = None if self.cached else self.begin()
        if self.cached or (self.process and self.process.poll() is not None):
            self.percent = 100
            return True
        said = self.log.read_text(errors="replace")[-400:] if self.log.exists() else ""
        marks = re.findall(r"\[ *(\d+)%\]", said)
        self.percent = int(marks[-1]) if marks else self.percent
        return False

    def stop(self) -> None:
        """End the run and every rank it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)

    def result(self) -> Report:
        """The report. Raises InputError when the run wrote none, with the last line it said."""
        while not self.poll():
            time.sleep(0.05)
        status = 0 if self.process is None else self.process.wait()
        if status == NO_CASE and not self.report.exists():
            raise InputError(f"{self.label}: no case matches the selection")
        try:
            return read(self.report)
        except ReportError as error:
            self.report.unlink(missing_ok=True)
            raise InputError(
                f"{self.label}: the run {_ended(status)} without a report: {self._last_words()}"
                f" (all of it: {self.log})"
            ) from error

    def _last_words(self) -> str:
        said = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        lines = said.splitlines() or ["it said nothing"]
        return one_line(next((line for line in lines if "rror" in line), lines[-1]), 300)


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def start(
    environment: Environment,
    selection: Selection,
    label: str,
    root: Path | None = None,
    popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
) -> Run:
    """Start the suite in an environment, go on with an interrupted run, or find the report of an
    equal one in the cache.

    Raises InputError when the process cannot be started.
    """
    facts = [environment.key, suite_revision(selection.impl), *selection.arguments()]
    folder = (root or cache_root()) / "runs" / digest("\n".join(facts))
    run = Run(label, folder)
    run.begin = partial(_begin, run, environment, selection, popen)
    run.cached = run.report.exists()
    if not run.cached:
        run.process = run.begin()
    return run


def _begin(
    run: Run,
    environment: Environment,
    selection: Selection,
    popen: Callable[..., subprocess.Popen[bytes]],
) -> subprocess.Popen[bytes] | None:
    command = [environment.python, *command_line(selection, run.report)]
    facts = {"versions": dict(environment.versions), "command": shlex.join(command)}
    with on_disk(f"{run.label}: {run.folder}"):
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            (run.folder / "run.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
            with run.log.open("wb") as log:
                return popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=environment.variables(),
                    cwd=_checkout() or run.folder,
                    start_new_session=True,
                    pass_fds=(lock.fileno(),),
                )


def command_line(selection: Selection, report: Path) -> list[str]:
    """The interpreter's arguments for a run that writes a report."""
    where = [str(HERE / "checks")] if _checkout() else ["--pyargs", "conformance.checks"]
    quiet = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=no"]
    kept = ["-p", "conformance.journal"]
    return ["-m", "pytest", *where, *quiet, *kept, f"--report={report}", *selection.arguments()]


def _checkout() -> Path | None:
    """The root of a checkout, or None where the suite is installed."""
    root = HERE.parent
    return root if (root / "conftest.py").exists() and (root / "pyproject.toml").exists() else None


def stop_all(runs: Sequence[Run]) -> None:
    """End every run that is still going."""
    for run in runs:
        run.stop()
