"""Interrupted runs go on where they were, one at a time, and a full disk is one line."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conformance import environments, journal, recording
from conformance.environments import Environment, build_layer, on_disk
from conformance.errors import InputError
from conformance.journal import Journal, journal_of, read_journal
from conformance.plugin import CASE
from conformance.suite_run import Run, Selection, command_line, start

ROOT = str(Path(__file__).parent.parent)
ROW = {"case_id": "A01/m/-/single", "verdict": "passed", "measured": {"x": float("nan")}}


def item(case_id: str) -> Any:
    """What a journal looks at of an item."""
    found = SimpleNamespace(stash=pytest.Stash())
    found.stash[CASE] = SimpleNamespace(id=case_id)
    return found


def under_way(tmp_path: Path, rows: dict[str, Any]) -> tuple[Journal, list[Any]]:
    """A journal in a run whose recorder has some rows, and what was deselected."""
    left_out: list[Any] = []
    plugins = SimpleNamespace(getplugin=lambda name: SimpleNamespace(rows=rows))
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config: Any = SimpleNamespace(pluginmanager=plugins, hook=hook)
    return Journal(config, tmp_path / "report.json"), left_out


def over(case_id: str, when: str = "teardown") -> Any:
    return SimpleNamespace(when=when, user_properties=[("case_id", case_id)])


def test_a_case_that_is_over_is_written_down_and_not_run_again(tmp_path: Path) -> None:
    first, _ = under_way(tmp_path, {"A01/m/-/single": ROW})
    first.pytest_runtest_logreport(over("A01/m/-/single", "call"))
    assert not first.path.exists()
    first.pytest_runtest_logreport(over("A01/m/-/single"))
    rows: dict[str, Any] = {}
    second, left_out = under_way(tmp_path, rows)
    items = [item("A01/m/-/single"), item("B01/m/-/single")]
    second.pytest_collection_modifyitems(items)
    assert [i.stash[CASE].id for i in items] == ["B01/m/-/single"]
    assert len(left_out) == 1 and rows["A01/m/-/single"]["verdict"] == "passed"


def test_a_journal_cut_off_in_a_line_or_spoilt_counts_as_far_as_it_can_be_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "j"
    assert read_journal(path) == {}
    lines = [
        json.dumps(ROW),
        "[]",
        "1",
        '{"case_id": "x", "verdict": "fine"}',
        json.dumps(ROW)[:20],
    ]
    path.write_bytes("\n".join(lines).encode() + b"\xff\x00")
    assert list(read_journal(path)) == ["A01/m/-/single"]


@pytest.mark.parametrize(("status", "left"), [(0, "report"), (1, "report"), (2, "journal")])
def test_the_journal_goes_with_a_whole_report_and_half_a_report_goes(
    status: int, left: str, tmp_path: Path
) -> None:
    found, _ = under_way(tmp_path, {})
    found.report.write_text("{}")
    found.path.write_text("{}\n")
    found.pytest_sessionfinish(SimpleNamespace(exitstatus=pytest.ExitCode(status)))  # type: ignore[arg-type]
    assert found.report.exists() == (left == "report")
    assert found.path.exists() == (left == "journal")


def test_a_run_whose_parent_died_ends_at_the_next_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    found, _ = under_way(tmp_path, {"A01/m/-/single": ROW})
    monkeypatch.setattr(journal.os, "killpg", lambda *pair: sent.append(pair))
    found.pytest_runtest_logreport(over("A01/m/-/single"))
    assert sent == []
    monkeypatch.setattr(journal.os, "getppid", lambda: 1)
    found.pytest_runtest_logreport(over("A01/m/-/single"))
    assert sent == [(0, signal.SIGTERM)] and found.path.exists()


def test_the_runs_of_an_upgrade_keep_a_journal() -> None:
    line = command_line(Selection(), Path("r.json"))
    assert line[line.index("conformance.journal") - 1] == "-p"
    assert journal_of(Path("a/r.json")) == Path("a/r.json.journal")


SLOW = """
import time
from pathlib import Path
sys.path.insert(0, {root!r})
from conformance.report import Report, Row, write
out = Path(next(a for a in sys.argv if a.startswith("--report=")).partition("=")[2])
starts = out.with_name("starts")
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
while not out.with_name("go").exists():
    time.sleep(0.02)
write(Report("x", (Row("A01/m/-/single", "passed"),)), out)
"""


@pytest.fixture
def slow(tmp_path: Path) -> Environment:
    """An interpreter that writes its report when a file `go` lies beside it."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport sys\n{SLOW.format(root=ROOT)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return Environment(str(path), None, {})


def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never came to that")


def started(run: Run) -> bool:
    return (run.folder / "starts").exists()


def test_two_commands_at_once_share_a_run(slow: Environment, tmp_path: Path) -> None:
    first = start(slow, Selection(), "first", tmp_path / "cache")
    second = start(slow, Selection(), "second", tmp_path / "cache")
    until(lambda: started(first))
    assert second.process is None and not second.poll() and not first.poll()
    (first.folder / "go").touch()
    assert first.result() == second.result() and second.cached
    assert (first.folder / "starts").read_text() == "x"


def test_a_run_whose_owner_was_killed_is_taken_over(slow: Environment, tmp_path: Path) -> None:
    first = start(slow, Selection(), "first", tmp_path / "cache")
    second = start(slow, Selection(), "second", tmp_path / "cache")
    until(lambda: started(first))
    assert first.process is not None
    os.kill(first.process.pid, signal.SIGKILL)
    until(lambda: first.process and first.process.poll() is not None)
    (first.folder / "go").touch()
    assert second.result().rows[0].verdict == "passed" and not second.cached
    with pytest.raises(InputError, match="ended by SIGKILL") as error:
        Run("gone", tmp_path, first.process).result()
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_written_is_one_line(slow: Environment, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"):
        start(slow, Selection(), "x", tmp_path / "file")
    with pytest.raises(InputError, match="Not a directory"):
        build_layer({"demo": "1"}, tmp_path / "file")
    with (
        pytest.raises(InputError, match="cache: No space left on device") as error,
        on_disk("cache"),
    ):
        raise OSError(28, os.strerror(28))
    assert "\n" not in str(error.value)


def test_half_made_layers_of_killed_processes_are_swept(tmp_path: Path) -> None:
    names = [f".building-{2**22 + 1}-a", ".building-b", f".building-{os.getpid()}-c", "whole"]
    for name in names:
        (tmp_path / name).mkdir()
    environments._sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[2:])


def config(**options: Any) -> Any:
    values = {"markexpr": "", "keyword": "", "shard": None, "case": [], "deselect": None, **options}
    args = values.pop("args", ["conformance/checks"])
    return SimpleNamespace(getoption=lambda name, default=None: values[name], args=args)


def test_whatever_narrows_a_run_is_in_its_report() -> None:
    assert recording.selection(config()) == ""
    assert (
        recording.selection(config(markexpr="gemma4", case=["M05/*"]))
        == "-m 'gemma4' --case 'M05/*'"
    )
    assert recording.selection(config(shard="1/2")) == "--shard '1/2'"
    narrow = config(args=["conformance/checks/test_masks.py", "tests"])
    assert recording.selection(narrow) == "test_masks.py"


def test_a_run_needs_no_xdist(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-m", "smoke", "--collect-only"]
    done = subprocess.run(
        [*command, "conformance/checks/test_smoke.py", "conformance/checks/test_data_parallel.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:]


def test_a_case_whose_worker_crashed_has_a_row() -> None:
    recorder = object.__new__(recording.Recorder)
    recorder.rows, recorder.curves = {}, []
    node = "conformance/checks/test_masks.py::test_x[M04/gemma4-moe/-/single@gemma4-moe]"
    for name in (node, "tests/test_a.py::test_b[a/b/c/d]"):
        crash = pytest.TestReport(
            name, ("x", None, "x"), {}, "failed", "worker 'gw0' crashed", "???"
        )  # type: ignore[arg-type]
        recorder.pytest_runtest_logreport(crash)
    assert list(recorder.rows) == ["M04/gemma4-moe/-/single"]
    row = recorder.rows["M04/gemma4-moe/-/single"]
    assert row["verdict"] == "error" and "crashed" in row["message"]
