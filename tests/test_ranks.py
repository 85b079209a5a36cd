"""Fresh ranks: their start, their failures, and what they leave behind (nothing)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conformance import ranks
from tests import rank_functions as functions

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.ranks


def _python(*arguments: str) -> subprocess.Popen[bytes]:
    """Start this interpreter in the repository root, without a launcher's variables."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment)


def _free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _alive(pid: int) -> bool:
    """Does a process of this number run (a zombie does not)?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list]]:
    """Two `torchrun` agents side by side that stand for two hosts, started before the other
    tests."""
    directory = tmp_path_factory.mktemp("agents")
    port = _free_port()
    launch = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "t")
    script = (str(ROOT / "tests" / "rank_functions.py"), "launched", str(directory))
    processes = [
        _python(*launch, *meet, "--local-addr", "127.0.0.1", "--node-rank", str(node), *script)
        for node in range(2)
    ]
    yield directory, processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Two parents whose ranks sleep, one for SIGKILL and one for SIGINT."""
    started = {}
    for number in (signal.SIGKILL, signal.SIGINT):
        directory = tmp_path_factory.mktemp(number.name)
        script = str(ROOT / "tests" / "rank_functions.py")
        started[number] = directory, _python(script, "parent", str(directory))
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


def _directories() -> set[str]:
    """Scratch directories on this machine."""
    import tempfile

    return {
        name for name in os.listdir(tempfile.gettempdir()) if name.startswith("conformance-ranks-")
    }


@pytest.fixture(autouse=True)
def nothing_left(agents: tuple, parents: dict) -> Iterator[None]:
    """After every test, no process of a rank is left and the next start works."""
    yield
    assert all(not process.is_alive() for process in ranks.multiprocessing.active_children())


def test_results_come_back_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank is fresh: seeded alike, one thread, no CUDA context, the parent's environment
    now."""
    monkeypatch.setenv("RANKS_TEST_MARKER", "now")
    first = ranks.run(2, functions.hello, torch.ones(3))
    again = ranks.run(2, functions.hello, torch.ones(3))
    assert [each["rank"] for each in first] == [0, 1]
    assert torch.equal(first[1]["sum"], torch.full((3,), 3.0))
    assert {each["draw"] for each in first + again} == {first[0]["draw"]}
    assert not any(each["cuda"] for each in first)
    assert all(each["threads"] == 1 and each["marker"] == "now" for each in first)
    assert all(each["server_threads"] == 1 for each in first), "a fork would lose threads"
    assert all(each["preloaded"] for each in first)
    assert len({each["pid"] for each in first + again}) == 4
    assert not Path(first[0]["scratch"]).exists()
    assert not any(_alive(each["pid"]) for each in first + again)


def test_one_rank_raises() -> None:
    """The rank that raised is named, with its traceback, its exception and its output."""
    begin = time.monotonic()
    with pytest.raises(ranks.RankFailed, match="rank 1 failed") as caught:
        ranks.run(2, functions.raise_on_one, timeout=20.0)
    assert caught.value.rank == 1
    assert isinstance(caught.value.error, functions.Own)
    assert "raise_on_one" in caught.value.traceback
    assert "said before raising" in caught.value.traceback
    assert time.monotonic() - begin < 10.0


@pytest.mark.parametrize(
    ("fn", "place"),
    [
        (functions.killed_in_forward, "forward of layer 0"),
        (functions.killed_in_collective, "all-reduce"),
    ],
)
def test_one_rank_is_killed(fn: object, place: str) -> None:
    """A killed rank is named with its last place, not the peer that complains of a lost
    connection."""
    with pytest.raises(ranks.RankFailed, match="rank 1 was killed by SIGKILL") as caught:
        ranks.run(2, fn, timeout=20.0)
    assert caught.value.rank == 1
    assert place in caught.value.traceback


def test_one_rank_skips_a_collective() -> None:
    """The rank that waits is named with its line, and its peer's early return is said."""
    with pytest.raises(ranks.RankFailed, match="all_reduce") as caught:
        ranks.run(2, functions.skip_collective, timeout=1.5)
    assert caught.value.rank == 0
    assert "had already returned" in caught.value.traceback


def test_hang_ends_with_every_stack() -> None:
    """A hang outside of collectives ends at the deadline with the stacks of all ranks."""
    begin = time.monotonic()
    with pytest.raises(ranks.RanksTimeout) as caught:
        ranks.run(2, functions.hang, timeout=0.5)
    assert sorted(caught.value.stacks) == [0, 1]
    assert all("in hang" in stack for stack in caught.value.stacks.values())
    assert time.monotonic() - begin < 8.0


def test_result_that_cannot_be_pickled() -> None:
    """A result that cannot travel is the rank's failure, not a hang."""
    with pytest.raises(ranks.RankFailed, match="pickle|local object"):
        ranks.run(2, functions.unpicklable)


def test_late_preload_is_refused() -> None:
    """Modules named after the start would silently not be preloaded."""
    ranks.warm()
    with pytest.raises(RuntimeError, match="before the first"):
        ranks.preload(["json"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_parent_dies(number: signal.Signals, parents: dict) -> None:
    """A parent that is killed or interrupted leaves no rank and no directory."""
    directory, process = parents[number]
    expiry = time.monotonic() + 60.0
    files = [directory / "rank.0", directory / "rank.1"]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < expiry and process.poll() is None
        time.sleep(0.05)
    entries = [file.read_text().split() for file in files]
    assert all(_alive(int(pid)) for pid, _ in entries)
    process.send_signal(number)
    process.wait(20.0)
    expiry = time.monotonic() + 10.0
    while any(_alive(int(pid)) or Path(path).exists() for pid, path in entries):
        assert time.monotonic() < expiry, entries
        time.sleep(0.05)


def test_two_agents_stand_for_two_hosts(agents: tuple) -> None:
    """Under `torchrun` the same call runs in place: all results on every rank, a failure on every
    rank."""
    directory, processes = agents
    assert [process.wait(120.0) for process in processes] == [0, 0]
    lines = sorted((directory / f"launched.{rank}").read_text() for rank in range(2))
    expected = "True | 1 Own | the case needs 4 ranks, this run has 2"
    assert lines == [f"{expected} | False", f"{expected} | True"]
