"""Golden loss curves: twenty AdamW steps of the unpatched class in float64, kept as JSON.

The golden is what the installed class computes by its own logits and a plain cross-entropy; its
file says in which environment. `fixtures/scripts/make_curves.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conformance import batches
from conformance.case import Model
from conformance.checkpoint import build_stock

STEPS = 20
RATE = 2e-4  # at 1e-3 rounding grows to 0.1 and more in twenty steps of a recurrent model
ROOT = Path(__file__).parent / "fixtures" / "curves"
if not ROOT.is_dir():  # in a checkout the fixtures lie beside the package
    ROOT = Path(__file__).parents[1] / "fixtures" / "curves"

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def train(
    model: nn.Module, loss: Loss, batch_of: Callable[[int], Mapping[str, Tensor]]
) -> list[float]:
    """The losses of `STEPS` AdamW steps, each before its step. batch_of: the batch of a step."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    curve = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, batch_of(step))
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        curve.append(float(value.detach()))
    return curve


def plain_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the labels, each predicted from the position before it."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    targets = batch["labels"][:, 1:]
    kept = targets != batches.IGNORE
    chosen = logits[:, :-1].log_softmax(-1)[kept].gather(-1, targets[kept][:, None])
    mean: Tensor = -chosen.mean()
    return mean


def samples(model: Model, step: int) -> list[dict[str, Tensor]]:
    """The two samples of a step: two batches in turn, so that the loss has something to learn."""
    return batches.samples(model, "text", seed=step % 2)


def golden_curve(model: Model) -> list[float]:
    """The curve of the unpatched class in float64, computed here and now."""
    stock = build_stock(model, torch.float64, attn="eager", experts="eager")
    return list(train(stock, plain_loss, lambda step: batches.stack(samples(model, step))))


def read(model: Model) -> dict[str, Any]:
    """The committed golden: `losses` and `environment`. Raises ValueError where there is none."""
    path = ROOT / f"{model.name}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        make = "python fixtures/scripts/make_curves.py writes it"
        raise ValueError(f"no golden curve for {model.name} ({make}): {error}") from error
    return found
