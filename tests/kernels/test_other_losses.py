"""Others' losses as implementations: what they lack is said, what they give is checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.implementation import load
from conformance.implementations import losses
from conformance.implementations.losses import Declined, OtherLoss

NAMES = ("FULL_LOGITS", "COMPILED", "LIGER", "CUT", "CUT_EXACT", "TORCH")


@pytest.mark.parametrize("name", NAMES)
def test_each_is_an_adapter(name: str) -> None:
    """It loads by its documented name and claims the loss alone."""
    loaded = load(f"conformance.implementations.losses:{name}")
    assert set(loaded.capabilities) == {"linear_cross_entropy"}


@pytest.mark.parametrize(
    ("name", "dtype", "option", "said"),
    (
        ("LIGER", torch.float64, {}, "float64"),
        ("CUT", torch.float32, {}, "bfloat16"),
        ("CUT", torch.bfloat16, {"bias": torch.zeros(3)}, "bias"),
        ("TORCH", torch.float32, {"softcap": 30.0}, "softcap"),
    ),
)
def test_what_it_would_ignore_is_declined(
    name: str, dtype: torch.dtype, option: dict[str, Any], said: str
) -> None:
    """What the function cannot do is refused before it is called."""
    other: OtherLoss = getattr(losses, name)
    rows, weight = torch.zeros(2, 4, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
    with pytest.raises(Declined, match=said):
        other.linear_cross_entropy(rows, weight, torch.zeros(2, dtype=torch.long), **option)


def test_the_divisor_counts_labels() -> None:
    """Full logits divide by the labels that count, or by the number that is given."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    labels = torch.tensor([1, -100, 3, -100, 6])
    per_token = losses.FULL_LOGITS.linear_cross_entropy(hidden, weight, labels, reduction="none")
    mean = losses.FULL_LOGITS.linear_cross_entropy(hidden, weight, labels)
    fixed = losses.FULL_LOGITS.linear_cross_entropy(hidden, weight, labels, num_items_in_batch=10)
    torch.testing.assert_close(mean, per_token.sum() / 3)
    torch.testing.assert_close(fixed, per_token.sum() / 10)
