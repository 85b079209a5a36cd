"""Expert adapters written before PEFT swapped the features mean the same update afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from impl.adapter_history import in_todays_layout

EXPERTS, RANK = 3, 2


class Wrapper(nn.Module):
    """What is asked of PEFT's wrapper of an expert parameter (E, out, in)."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.num_experts = in_features, out_features, EXPERTS
        self._did_swap_in_out_features = True


def old_update(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(E, D1, D2), element by element, as PEFT 0.18 defined it."""
    delta = torch.zeros(EXPERTS, a.shape[1], b.shape[0], dtype=a.dtype)
    for e in range(EXPERTS):
        for r in range(RANK):
            delta[e] += torch.outer(a[e * RANK + r], b[:, r * EXPERTS + e])
    return delta


def new_update(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(E, out, in), element by element, as PEFT defines it since 0.19."""
    delta = torch.zeros(EXPERTS, b.shape[0], a.shape[1], dtype=a.dtype)
    for e in range(EXPERTS):
        for r in range(RANK):
            delta[e] += torch.outer(b[:, r * EXPERTS + e], a[e * RANK + r])
    return delta


@pytest.mark.parametrize(("sizes", "version"), [((5, 4), None), ((4, 4), "0.18.1")])
def test_older_factors_mean_the_same(sizes: tuple[int, int], version: str | None) -> None:
    model = nn.ModuleDict({"experts": Wrapper(*sizes)})
    a = torch.randn(EXPERTS * RANK, sizes[0], dtype=torch.float64)
    b = torch.randn(sizes[1], RANK * EXPERTS, dtype=torch.float64)
    old: dict[str, Any] = {"experts.lora_A.weight": a, "experts.lora_B.weight": b}
    new = in_todays_layout(model, old, version)
    got = new_update(new["experts.lora_A.weight"], new["experts.lora_B.weight"])
    assert torch.equal(got, old_update(a, b))


@pytest.mark.parametrize("version", ["0.19.0", "0.21.2", None, "no version"])
def test_todays_factors_stay(version: str | None) -> None:
    model = nn.ModuleDict({"experts": Wrapper(4, 4)})
    now = {
        "experts.lora_A.weight": torch.randn(EXPERTS * RANK, 4),
        "experts.lora_B.weight": torch.randn(4, RANK * EXPERTS),
        "router.lora_A.weight": torch.randn(2, 4),
    }
    got = in_todays_layout(model, now, version)
    assert all(got[key] is value for key, value in now.items())
