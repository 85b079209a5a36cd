"""The cross-entropy over ranks: split vocabulary, DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance import ranks
from impl.kernels.cross_entropy_parallel import vocabulary_parallel_cross_entropy
from tests.kernels import cross_entropy_ranks as functions

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "num_items_in_batch": 40}])
def test_vocabulary_parallel(options: dict[str, Any]) -> None:
    """Two unequal shards give the whole loss and gradients, with one gather of two numbers."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 16, dtype=torch.float64).requires_grad_()
    weight = torch.randn(101, 16).double().requires_grad_()
    bias = torch.randn(101).double().requires_grad_()
    labels = torch.randint(0, 101, (2, 9))
    labels[0, :4] = -100
    z, cap = hidden @ weight.t() + bias, options.get("softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    loss = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = loss / options.get("num_items_in_batch", 14)
    loss.backward()
    got = ranks.run(2, functions.vocabulary_parallel, options)
    for rank in got:
        torch.testing.assert_close(rank["loss"], loss.detach())
        torch.testing.assert_close(rank["hidden"], hidden.grad)
        assert rank["gathered"].tolist() == [2 * 14]
    torch.testing.assert_close(torch.cat([r["weight"] for r in got]), weight.grad)
    torch.testing.assert_close(torch.cat([r["bias"] for r in got]), bias.grad)


def test_rows_outside_the_vocabulary() -> None:
    """One clear line."""
    with pytest.raises(ValueError, match="outside a vocabulary of 10"):
        vocabulary_parallel_cross_entropy(
            torch.randn(2, 4), torch.randn(8, 4), torch.zeros(2, dtype=torch.int64),
            vocabulary_start=4, vocabulary=10,
        )  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2+head"])
@pytest.mark.parametrize("name", ["gemma4-moe", "mixtral"])
def test_sharded(name: str, strategy: str) -> None:
    """Under DDP and FSDP2 (head sharded alone or with the root) gradients are the model's own."""
    if strategy == "fsdp2+head" and name == "gemma4-moe":
        name = "qwen3_next"  # gemma4's head is its embedding: one parameter, one group
    own = ranks.run(2, functions.sharded_step, name, strategy, False)
    fused = ranks.run(2, functions.sharded_step, name, strategy, True)
    for mine, theirs in zip(fused, own, strict=True):
        assert mine["calls"] == 1
        torch.testing.assert_close(mine["loss"], theirs["loss"])
        assert mine["grads"].keys() == theirs["grads"].keys()
        wanted = theirs["grads"]
        floor = 1e-4 * float(torch.stack([g.norm() for g in wanted.values()]).norm())
        for key, grad in mine["grads"].items():
            error = float((grad - wanted[key]).norm()) / max(float(wanted[key].norm()), floor)
            assert error < 2e-5, f"{key}: {error:.1e}"
