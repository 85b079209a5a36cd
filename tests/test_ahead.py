"""Starts ahead of their cases, one forkserver for several processes, and when it begins."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conformance import ahead, rank_server, starting
from conformance.catalogue import checks
from conformance.families import MODELS

ROOT = Path(__file__).resolve().parent.parent
LIGHT = "from conformance import rank_server, ranks; from tests import rank_functions as f;"


@pytest.fixture
def _nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own starts are out of the way, and nothing is held, as while a case runs."""
    monkeypatch.setattr(ahead, "_promised", {})
    monkeypatch.setattr(ahead, "_held", False)


@pytest.mark.usefixtures("_nothing_is_promised")
def test_a_start_is_taken_once_and_its_error_too() -> None:
    """Each key starts once; what it gave or raised is had by whoever asks; others start then."""
    begun: list[str] = []

    def works() -> str:
        begun.append("a")
        return "A"

    def fails() -> str:
        raise ValueError("ranks died")

    end = ahead.begin([("a", works), ("b", fails), ("a", fails)])
    try:
        assert ahead.taken("a", works) == "A" and begun == ["a"]
        with pytest.raises(ValueError, match="ranks died"):
            ahead.taken("b", fails)
        assert ahead.taken("c", lambda: "C") == "C"
    finally:
        end()


@pytest.mark.usefixtures("_nothing_is_promised")
def test_nothing_runs_while_held_and_the_end_drops_the_rest() -> None:
    """`held` waits for what runs and lets nothing begin; what is asked for before it began runs
    where it is asked for; the end does not run what nobody asked for."""
    go, begun = threading.Event(), []
    first = [(n, go.wait) for n in range(ahead.IN_FLIGHT)]
    rest = [(n, lambda n=n: begun.append(n)) for n in range(10, 15)]
    end = ahead.begin([*first, *rest])
    threading.Timer(0.05, go.set).start()
    with ahead.held():
        assert go.is_set() and not begun
        assert ahead.taken(14, lambda: "here") == "here"
        closing = threading.Thread(target=end)
        closing.start()
        closing.join(0.05)
    closing.join(5)
    assert not closing.is_alive() and not set(begun) - {10, 11} and not ahead._promised


def test_checks_of_evidence_say_what_they_read() -> None:
    """A check whose source asks for a start's evidence declares `reads`, or no start is ahead."""
    read = ("evidence.evidence(", "evidence.saved_adapter(")
    found = {}
    for check, function in checks().values():
        source = inspect.getsource(function)
        found[check.id] = (any(word in source for word in read), check.reads is not None)
    assert sum(asks for asks, _ in found.values()) > 20
    assert [name for name, (asks, told) in found.items() if asks != told] == []


@pytest.mark.ranks
def test_processes_share_a_forkserver_or_start_their_own() -> None:
    """A process that is told of another's forkserver has its ranks forked there; with nobody
    behind the address it starts its own."""
    light = "base=('torch', 'torch.distributed', 'conformance.rank_process')"
    there = f"{LIGHT} ranks.preload((), {light}); rank_server.use(told);"
    user = f"import json, sys; told = json.loads(sys.argv[1]); {there}"
    user += " print(json.dumps(ranks.run(2, f.forked_by)))"
    owner = (
        f"import json, os, socket, subprocess, sys, tempfile; {LIGHT} ranks.preload((), {light});"
        "own = ranks.run(2, f.forked_by);"
        "told = {n: v for n, v in rank_server.told().items() if isinstance(v, str)};"
        "gone = tempfile.mktemp(); socket.socket(socket.AF_UNIX).bind(gone);"
        "ask = lambda where: json.loads("
        "    subprocess.check_output([sys.executable, '-c', sys.argv[1], json.dumps(where)]));"
        "asked = [ask(told), ask({'_forkserver_address': gone}), ask({})];"
        "os.unlink(gone); print(json.dumps([own, *asked]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", owner, user], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    own, shared, gone, alone = json.loads(ended.stdout.splitlines()[-1])
    assert len({*own, *shared}) == 1
    assert len({own[0], *gone, *alone}) == 3


GEMMA4 = [m.name for m in MODELS.values() if m.family == "gemma4"]


@pytest.mark.parametrize(
    ("expression", "models"),
    [
        ("", list(MODELS)),
        ("ranks", list(MODELS)),
        ("gemma4", GEMMA4),
        ("gemma4 and fsdp2", GEMMA4),
        ("gemma4-moe and tp_ep and lora", ["gemma4-moe"]),
        ("gemma4 and not ranks", []),
        ("gemma4-dense and tp_ep", []),
        ("smoke", []),
        ("single", []),
        ("gemma4 and (", []),
    ],
)
def test_the_forkserver_begins_where_markers_tell(expression: str, models: list[str]) -> None:
    """The models whose cases an expression spreads, before anything is collected."""
    assert starting._foreseen(_config(expression)) == models


def test_the_forkserver_waits_where_cases_are_named() -> None:
    """`-k`, `--case`, files and other folders: which cases there are is known after collecting."""
    assert starting._foreseen(_config("", keyword="x")) == []
    assert starting._foreseen(_config("", case=["F01/*"])) == []
    assert starting._foreseen(_config("", args=["conformance/checks/test_moe.py"])) == []
    assert starting._foreseen(_config("", args=["tests"])) == []


def _config(expression: str, keyword: str = "", case: Any = (), args: Any = None) -> Any:
    options = {"-m": expression, "case": case, "pyargs": False}
    return SimpleNamespace(
        args=args or ["conformance/checks"],
        option=SimpleNamespace(keyword=keyword),
        invocation_params=SimpleNamespace(dir=ROOT),
        getoption=options.__getitem__,
    )


def test_told_is_what_a_worker_can_be_sent() -> None:
    """Strings and bytes alone, under the names that `use` gives them."""
    assert all(isinstance(value, (str, bytes)) for value in rank_server.told().values())
