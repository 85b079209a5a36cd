"""The training loss against sums by hand, for every kind of batch and count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conformance import batches, checkpoint
from impl.collate import collate
from impl.loss import count_items, loss
from tests.impl.plans import make_plan, spec

NAMES = ("mixtral", "gemma4-moe", "gemma3-vlm", "qwen3_5")


def by_hand(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Σ −log p of every labelled token, one at a time, in float64."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits.double()
    total, count = 0.0, 0
    for row, labels in zip(logits, batch["labels"], strict=True):
        for position, label in enumerate(labels[1:].tolist()):
            if label != -100:
                total -= float(row[position].log_softmax(-1)[label])
                count += 1
    return total, count


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_sum_over_labelled_tokens_over_the_count(name: str) -> None:
    model = checkpoint.build_stock(spec(name))
    kind = "mixed" if spec(name).images else "padded"
    batch = collate(batches.samples(spec(name), kind, count=3), make_plan(spec(name)))
    total, count = by_hand(model, batch)
    assert count == int(count_items(batch)) and count > 10
    assert loss(model, batch).item() == pytest.approx(total / count, rel=1e-5)
    assert loss(model, batch, 7).item() == pytest.approx(total / 7, rel=1e-5)


@pytest.mark.parametrize(
    "count",
    [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0, dtype=torch.float16)],
)
def test_the_count_may_be_of_any_type(count: Any) -> None:
    model = checkpoint.build_stock(spec("mixtral"))
    batch = collate(batches.samples(spec("mixtral"), "padded"), make_plan())
    assert torch.equal(loss(model, batch, count), loss(model, batch, 7))


@pytest.mark.parametrize("name", NAMES)
def test_accumulation_equals_one_batch(name: str) -> None:
    # eager attention in float64 is NaN in rows that a window closes altogether
    model = checkpoint.build_stock(spec(name), dtype=torch.float64, attn="sdpa")
    samples = batches.samples(spec(name), "padded", count=4)
    whole = collate(samples, make_plan())
    items = count_items(whole)
    loss(model, whole, items).backward()  # type: ignore[no-untyped-call]
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = [collate([sample], make_plan()) for sample in samples]
    value = sum(float(loss(model, part, items)) for part in parts)
    for part in parts:
        loss(model, part, items).backward()  # type: ignore[no-untyped-call]
    assert value == pytest.approx(float(loss(model, whole, items)), rel=1e-6)
    size = max(float(g.norm()) for g in expected.values())
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            off = float((parameter.grad - expected[parameter_name]).norm())
            assert off < 1e-5 * size, (parameter_name, off)


@pytest.mark.parametrize("items", [None, 0, 12])
def test_nothing_labelled_gives_zero_and_zero_gradients(items: int | None) -> None:
    model = checkpoint.build_stock(spec("gemma4-text"))
    batch = collate(batches.samples(spec("gemma4-text"), "text"), make_plan())
    batch["labels"] = torch.full_like(batch["labels"], -100)
    value = loss(model, batch, items)
    value.backward()  # type: ignore[no-untyped-call]
    assert float(value) == 0
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(float(g.abs().max()) == 0 for g in grads)


def test_shift_labels_are_not_shifted_again() -> None:
    model = checkpoint.build_stock(spec("mixtral"))
    batch = collate(batches.samples(spec("mixtral"), "text"), make_plan())
    labels = batch.pop("labels")
    shifted = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], dim=1)
    expected = loss(model, batch | {"labels": labels})
    assert torch.equal(loss(model, batch | {"shift_labels": shifted}), expected)
    with pytest.raises(ValueError, match="no labels"):
        loss(model, batch)


def test_label_smoothing_mixes_in_the_uniform_distribution() -> None:
    model = checkpoint.build_stock(spec("mixtral"))
    batch = collate(batches.samples(spec("mixtral"), "padded"), make_plan())
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logs = model(**inputs).logits.log_softmax(-1)[:, :-1]
    targets = batch["labels"][:, 1:]
    kept = targets != -100
    nll = -logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    expected = (0.9 * nll + 0.1 * -logs.mean(-1))[kept].mean()
    found = loss(model, batch, label_smoothing=0.1)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_the_auxiliary_loss_counts_by_tokens_not_by_micro_batches() -> None:
    model: Any = checkpoint.build_stock(spec("mixtral"))
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    sample = batches.samples(spec("mixtral"), "text", count=1)
    batch = collate(sample, make_plan())
    items = count_items(batch)
    once = loss(model, batch, items)
    twice = loss(model, batch, 2 * items) + loss(model, batch, 2 * items)
    assert float(twice) == pytest.approx(float(once), rel=1e-6)
    model.config.router_aux_loss_coef = 0.0
    assert float(loss(model, batch, items)) < float(once) - 0.1


def test_wrapped_models_are_read_below_the_wrapper() -> None:
    class Wrapper(nn.Module):  # as DDP: no attribute `config`
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **kwargs: Any) -> Any:
            return self.module(**kwargs)

    model = checkpoint.build_stock(spec("mixtral"))
    batch = collate(batches.samples(spec("mixtral"), "text"), make_plan())
    assert torch.equal(loss(Wrapper(model), batch), loss(model, batch))
