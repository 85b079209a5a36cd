"""Conversations: what the oracles write by hand-written examples, and torchvision's shim."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from conformance import torchvision_ops
from conformance.oracles import picture_tokens
from conformance.oracles.turns import Turns, pieces, tokens

HOW = Turns("^", "[{role}]", "$", "\n", model="bot", system=False)


@pytest.mark.parametrize(
    ("size", "want"), [((10, 10), 64), ((10, 1000), 70), ((1000, 10), 70), ((40, 90), 60)]
)
def test_a_budget_keeps_the_shape(size: tuple[int, int], want: int) -> None:
    assert picture_tokens.within_budget(70)(*size) == want


@pytest.mark.parametrize(("size", "want"), [((16, 16), 16), ((400, 400), 25), ((3, 5), 6)])
def test_an_area_is_met(size: tuple[int, int], want: int) -> None:
    assert picture_tokens.within_area(side=4, least=64, most=400)(*size) == want


def test_turns_are_written_out() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "that "}, {"type": "image"}]},
    ]
    found = pieces(messages, HOW, lambda part: "<i>")
    assert "".join(text for text, _ in found) == "^[user]be brief\n\n<i>what?$\n[bot]that <i>$\n"
    assert [text for text, trained in found if trained] == ["that ", "$"]


def test_neighbours_of_one_kind_are_one_text() -> None:
    found = tokens([("a", False), ("b", False), ("c", True)], lambda text: [len(text)])
    assert found == [(2, False), (1, True)]


def test_without_torchvision_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_ops, "find_spec", lambda name: None)
    assert torchvision_ops.ensure() == "torchvision is not installed"


def test_a_torchvision_that_fails_otherwise_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise RuntimeError("another reason")

    monkeypatch.setattr(torchvision_ops, "find_spec", lambda name: object())
    monkeypatch.setattr(torchvision_ops.importlib, "import_module", broken)
    assert torchvision_ops.ensure() == "torchvision does not import: another reason"
    assert "torchvision" not in sys.modules or torchvision_ops.UNUSABLE is None
