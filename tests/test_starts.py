"""A start takes what is read of it, and its ranks begin with the model of the forkserver."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conformance import reading
from conformance.case import Case, Check
from conformance.families import MODELS
from conformance.matrix import cases
from conformance.settings import Setting
from conformance.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
STEP, TRAINS = Check("A1"), Check("A2", reads=("training",))
SPREAD = ("ddp", "tp_ep")


def case(check: Check, strategy: str, setting: str = "-") -> Case:
    """A case of mixtral."""
    return Case(check, MODELS["mixtral"], Setting.parse(setting), STRATEGIES[strategy])


@pytest.fixture
def _nothing_is_expected() -> Iterator[None]:
    """The run's own cases, back after the test."""
    kept = dict(reading._read)
    yield
    reading._read.clear()
    reading._read.update(kept)


@pytest.mark.usefixtures("_nothing_is_expected")
def test_a_start_takes_what_its_cases_read() -> None:
    """A step's case shares the start of one that reads more; other strategies and settings do not;
    one process has what any strategy reads."""
    reading.expect([case(STEP, "ddp"), case(TRAINS, "ddp"), case(STEP, "tp"), case(STEP, "ddp")])
    assert reading.parts(case(STEP, "ddp")) == {"training"}
    assert reading.parts(case(STEP, "tp")) == reading.parts(case(STEP, "ddp", "lora")) == set()
    assert reading.parts_of_all(case(STEP, "tp")) == {"training"}
    assert reading.parts(case(TRAINS, "cp")) == {"training"}, "unexpected cases read their own"


def test_one_model_of_a_family_has_each_strategy() -> None:
    """By default each strategy is asked of one model a family, one with its traits; the full matrix
    asks all."""
    check = Check("A3", strategies=SPREAD, one_a_family=True)
    found = [(c.model.family, c.strategy.name) for c in cases(check) if c.model]
    capable = {
        (m.family, name)
        for m in MODELS.values()
        for name in SPREAD
        if STRATEGIES[name].applies_to(m.traits)
    }
    assert sorted(found) == sorted(capable)
    every = [m for m in MODELS.values() for name in SPREAD if (m.family, name) in capable]
    assert len(found) < len(cases(check, "full")) <= len(every)


@pytest.mark.ranks
def test_ranks_are_forked_with_the_model() -> None:
    """The forkserver's model is the checkpoint's to the bit, once, and none where a rank must load
    its own; no thread came of it."""
    code = (
        "import json; from conformance import ranks; from tests import rank_functions as f;"
        "ranks.expect(['mixtral'], 'reference'); print(json.dumps(ranks.run(2, f.inherited)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    for rank in json.loads(ended.stdout.splitlines()[-1]):
        assert rank == {"equal": True, "again": False, "sharded": False, "server threads": 1}


def test_imports_are_told_what_the_gpus_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process answers an import's question, by every way to name a device; then torch's own
    function is back."""
    own = torch.cuda.get_device_capability
    rank_devices = importlib.import_module("conformance.rank_devices")  # which answers from now on
    try:
        assert len(rank_devices.capabilities()) == torch.cuda.device_count()
        monkeypatch.setattr(rank_devices, "capabilities", lambda: ((9, 0), (8, 6)))
        ask = torch.cuda.get_device_capability
        named = (None, 1, "cuda:1", torch.device("cuda", 0), torch.cuda.device(1))
        assert [ask(d) for d in named] == [(9, 0), (8, 6), (8, 6), (9, 0), (8, 6)]
    finally:
        rank_devices.ask_again()
    assert torch.cuda.get_device_capability is own
