"""Others' losses as implementations: what they lack is said, what they give is checked."""

from __future__ import annotations

import pytest
import torch

from conformance.implementation import load
from conformance.implementations import losses
from conformance.implementations.losses import Declined, OtherLoss

NAMES = ("FULL_LOGITS", "COMPILED", "LIGER", "CUT", "CUT_EXACT")


@pytest.mark.parametrize("name", NAMES)
def test_each_is_an_adapter(name: str) -> None:
    """It loads by its documented name and claims the loss alone."""
    loaded = load(f"conformance.implementations.losses:{name}")
    assert set(loaded.capabilities) == {"linear_cross_entropy"}


@pytest.mark.parametrize("name", ("LIGER", "CUT"))
def test_what_has_no_argument_is_declined(name: str) -> None:
    """A scale that the function would ignore is refused before it is called."""
    other: OtherLoss = getattr(losses, name)
    rows = torch.zeros(2, 4)
    with pytest.raises(Declined, match="logit_scale"):
        other.linear_cross_entropy(
            rows, torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), logit_scale=0.5
        )


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
