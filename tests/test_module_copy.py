"""The suite's copier gives what deepcopy gives: equal, apart, and shared where it was shared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from conformance.module_copy import copied


class Net(nn.Module):
    """A tied weight, a buffer, a shared child, a bound method on the instance, a config."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(3)
        self.again = self.norm
        self.heads = nn.MultiheadAttention(3, 1)  # has a __setstate__ of its own
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("view", self.table[1:], persistent=False)
        self.config = {"layers": [1, 2], "nested": {"dtype": torch.float64}}
        self.norm.register_forward_hook(self.count)
        self.calls = 0
        self.head.weight.requires_grad_(False)

    def count(self, *_: Any) -> None:
        self.calls += 1

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.embed(ids)) + self.table)
        return out


@pytest.mark.parametrize("copier", [copied, copy.deepcopy])
def test_copy_is_equal_and_apart(copier: Any) -> None:
    net = Net()
    twin = copier(net)
    ids = torch.tensor([[0, 3, 1]])
    assert torch.equal(net(ids), twin(ids))
    assert (net.calls, twin.calls) == (1, 1), "each hook counts on its own module"
    assert twin.head.weight is twin.embed.weight, "a tied weight stays tied"
    assert twin.again is twin.norm, "a shared child stays shared"
    mine, other = ({id(t) for t in (*m.parameters(), *m.buffers())} for m in (net, twin))
    assert not mine & other
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in net.parameters()
    ]
    twin.table[1] = 7.0
    assert (float(net.view[0]), float(twin.view[0])) == (1.0, 7.0), "a view stays a view"
    twin.config["layers"].append(3)
    assert net.config["layers"] == [1, 2]
    with torch.no_grad():
        twin.head.weight.zero_()
    assert net.head.weight.any()


def test_names_and_order_are_kept() -> None:
    net = Net()
    twin = copied(net)
    assert [n for n, _ in twin.named_modules()] == [n for n, _ in net.named_modules()]
    assert list(twin.state_dict()) == list(net.state_dict())
    assert list(vars(twin)) == list(vars(net))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_a_parametrized_copy_has_a_class_of_its_own() -> None:
    net = Net()
    parametrize.register_parametrization(net.norm, "weight", Doubled())
    twin = copied(net)
    ids = torch.tensor([[0, 3, 1]])
    assert torch.equal(net(ids), twin(ids))
    assert type(twin.norm) is not type(net.norm)
    with torch.no_grad():
        twin.norm.parametrizations.weight.original.fill_(3.0)
    with parametrize.cached():
        assert float(twin.norm.weight[0]) == 6.0
        assert float(net.norm.weight[0]) == 2.0, "what is cached is another's"
    parametrize.remove_parametrizations(twin.norm, "weight")
    assert type(twin.norm) is nn.LayerNorm
    assert float(twin.norm.weight[0]) == 6.0
    assert float(net.norm.weight[0]) == 2.0, "the other one is parametrized still"
