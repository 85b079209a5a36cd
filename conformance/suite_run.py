"""One run of the suite in an environment: a child process, kept by exact versions and revision."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from conformance.environments import Environment, cache_root, digest
from conformance.errors import InputError
from conformance.report import Report, ReportError, one_line, read

HERE = Path(__file__).parent
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
    """A run under way or done; `percent` is read off pytest's own progress."""

    label: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    cached: bool = False
    percent: int = field(default=0)

    @property
    def log(self) -> Path:
        """pytest's output."""
        return self.folder / "log.txt"

    def poll(self) -> bool:
        """Whether it is done; refreshes `percent`."""
        if self.process is None or self.process.poll() is not None:
            self.percent = 100
            return True
        marks = re.findall(r"\[ *(\d+)%\]", self.log.read_text(errors="replace")[-400:])
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
        status = 0 if self.process is None else self.process.wait()
        if status == 5:
            self._discard()
            raise InputError(f"{self.label}: no case matches the selection")
        try:
            return read(self.folder / "report.json")
        except ReportError as error:
            self._discard()
            said = self.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            last = next((line for line in said if "rror" in line), said[-1])
            raise InputError(
                f"{self.label}: the run ended with {status} and no report: {one_line(last, 300)}"
                f" (all of it: {self.log})"
            ) from error

    def _discard(self) -> None:
        (self.folder / "report.json").unlink(missing_ok=True)


def start(
    environment: Environment,
    selection: Selection,
    label: str,
    root: Path | None = None,
    popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
) -> Run:
    """Start the suite in an environment, or find the report of an equal run in the cache.

    Raises InputError when the process cannot be started.
    """
    facts = [environment.key, suite_revision(selection.impl), *selection.arguments()]
    folder = (root or cache_root()) / "runs" / digest("\n".join(facts))
    run = Run(label, folder)
    if (folder / "report.json").exists():
        run.cached = True
        return run
    folder.mkdir(parents=True, exist_ok=True)
    command = [environment.python, *command_line(selection, folder / "report.json")]
    facts_file = {"versions": dict(environment.versions), "command": shlex.join(command)}
    (folder / "run.json").write_text(json.dumps(facts_file, indent=1, sort_keys=True))
    try:
        with run.log.open("wb") as log:
            run.process = popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment.variables(),
                cwd=_checkout() or folder,
                start_new_session=True,
            )
    except OSError as error:
        raise InputError(f"{label}: {environment.python}: {error.strerror}") from error
    return run


def command_line(selection: Selection, report: Path) -> list[str]:
    """The interpreter's arguments for a run that writes a report."""
    where = [str(HERE / "checks")] if _checkout() else ["--pyargs", "conformance.checks"]
    quiet = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=no"]
    return ["-m", "pytest", *where, *quiet, f"--report={report}", *selection.arguments()]


def _checkout() -> Path | None:
    """The root of a checkout, or None where the suite is installed."""
    root = HERE.parent
    return root if (root / "conftest.py").exists() and (root / "pyproject.toml").exists() else None


def stop_all(runs: Sequence[Run]) -> None:
    """End every run that is still going."""
    for run in runs:
        run.stop()
