"""A late recurrent layer's scale running away under plain AdamW, on a tiny Qwen3.5-MoE.

No gradient is touched. The checkpoint is one in which a rarely routed expert feeds a late layer:
documents of rare tokens go to one expert, what it writes opens the output gate of the next
recurrent layer, and for all other tokens that gate is shut. So the layer has a gradient on one step
in ten; AdamW's second moment of it is a tenth of what such a step brings, and moves the layer √10
times as far as one that is fed always. The other layers see two answers to the same documents in
turn, between which they stay. The norms behind the convolution undo its scale, so nothing but
AdamW's own decay holds it.

Whether it happens depends on the run: where training shuts the gate for rare documents too, or
where the rare documents are learnt, the scale stays (`SEEDS` are tried in turn). Without the gate,
and with gradients of all layers alike, ratios stayed within 0.94 and 1.14 for all rates tried.

    python -m conformance.scale_drift --plot drift.svg
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conformance.captioning import curve_svg
from conformance.case import Model
from conformance.checkpoint import build_stock
from conformance.families import MODELS
from conformance.oracles.weight_scales import deviation

CONV = r"linear_attn\.conv1d\.weight"
RARE = torch.arange(70, 86)
COMMON = (3, 60)
EVERY = 10  # steps from one batch of rare documents to the next
RATE, THRESHOLD, BEYOND = 3e-3, 1.3, 1.32
STEPS = 900
SEEDS = (1, 2, 3, 4)
ROWS, LENGTH = 2, 16
EXPERT, FEEDS, READS = 5, 5, 6
START = 0.02  # of the convolutions' weights, times what they are by name
STRONG, GATE, WRITES = 4.0, 40.0, 0.1

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def deeper(model: Model) -> Model:
    """The model with eight layers, six of them recurrent, by another name."""
    layers = (["linear_attention"] * 3 + ["full_attention"]) * 2
    tiny = {**model.tiny, "num_hidden_layers": len(layers), "layer_types": layers}
    return dataclasses.replace(model, name=f"{model.name}-deeper", tiny=tiny)


@torch.no_grad()
def feed_rarely(model: Any) -> None:
    """Write the checkpoint described above into a model, in place.

    Three channels of the residual stream are kept free: 0 is high for rare tokens, 1 is what the
    expert writes, 2 is high for all.
    """
    inner = getattr(model, "model", model)
    inner.embed_tokens.weight[:, :2] = 0
    inner.embed_tokens.weight[:, 2] = STRONG
    inner.embed_tokens.weight[RARE, 0] = STRONG
    for name, parameter in inner.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight", "shared_expert.down_proj.weight")):
            parameter[:3] = 0
        elif name.endswith("experts.down_proj"):
            parameter[:, :3] = 0
        elif re.search(CONV, name):
            parameter.mul_(START)
    block, gate = inner.layers[FEEDS].mlp, inner.layers[READS].linear_attn.in_proj_z.weight
    block.gate.weight[:, :3] = 0
    block.gate.weight[EXPERT] = 0
    block.gate.weight[EXPERT, 0], block.gate.weight[EXPERT, 2] = 8, -4
    block.experts.gate_up_proj[EXPERT] *= 0.1
    block.experts.gate_up_proj[EXPERT, :, 0] = 1
    block.experts.down_proj[EXPERT, 1] = WRITES
    gate.zero_()
    gate[:, 1], gate[:, 2] = GATE, -GATE


def batch(step: int, every: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Two rows of 16 tokens: rare documents with labels drawn anew where the step is one of theirs,
    else the same common ones with one of two sets of labels in turn."""
    if step % every == every - 1:
        places = torch.arange(LENGTH)
        rows = [RARE[(places * (row + 1)) % len(RARE)] for row in range(ROWS)]
        labels = torch.randint(*COMMON, (ROWS, LENGTH), generator=rng)
        return {"input_ids": torch.stack(rows), "labels": labels}
    fixed = torch.Generator().manual_seed(99)
    ids, one, other = (torch.randint(*COMMON, (ROWS, LENGTH), generator=fixed) for _ in range(3))
    return {"input_ids": ids, "labels": other if step % 2 else one}


def names(model: nn.Module) -> list[str]:
    """The convolutions' weights, in the order of their layers."""
    return [name for name, _ in model.named_parameters() if re.search(CONV, name)]


def ratio(model: nn.Module) -> float:
    """The spread of the last convolution's weight over the upper median of all."""
    stds = [deviation(model.get_parameter(name))[1] for name in names(model)]
    return stds[-1] / sorted(stds)[len(stds) // 2]


def train(
    model: nn.Module,
    loss: Loss,
    steps: int,
    seed: int = 0,
    every: int = EVERY,
    rate: float = RATE,
    beyond: float = float("inf"),
) -> list[float]:
    """The ratio after each AdamW step, as torch's defaults have it but for the weight decay (0);
    the training ends once it is above `beyond`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, foreach=True)
    rng, found = torch.Generator().manual_seed(seed), list[float]()
    for step in range(steps):
        loss(model, batch(step, every, rng)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(ratio(model))
        if found[-1] > beyond:
            break
    return found


def stock_loss(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """The class's own loss."""
    found: Tensor = model(**rows, use_cache=False).loss
    return found


def mean_loss(model: nn.Module, loss: Loss) -> float:
    """Over the common documents with both answers, and rare ones."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return sum(float(loss(model, batch(step, 3, rng))) for step in range(3)) / 3


def drifted(steps: int = STEPS, every: int = EVERY) -> tuple[nn.Module, list[float]]:
    """A model by the first seed whose scale runs away, and its ratios; else by the last seed."""
    model: Any = None
    ratios: list[float] = []
    for seed in SEEDS:
        model = build_stock(deeper(MODELS["qwen3_5_moe-text"]))
        feed_rarely(model)
        ratios = train(model, stock_loss, steps, seed, every, beyond=BEYOND)
        if ratios[-1] > BEYOND:
            break
    return model, ratios


def main(arguments: Sequence[str] | None = None) -> int:
    """Train by each seed in turn until the scale has run away; print and draw it."""
    parser = argparse.ArgumentParser(prog="python -m conformance.scale_drift")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=EVERY)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args(arguments)
    _, ratios = drifted(options.steps, options.every)
    for step in range(49, len(ratios), 50):
        print(f"{step + 1:5}  {ratios[step]:6.3f}")
    print(f"{len(ratios):5}  {ratios[-1]:6.3f}")
    if options.plot:
        options.plot.write_text(curve_svg(ratios, "std of the last conv1d weight over the median"))
    return 0 if ratios[-1] > THRESHOLD else 1


if __name__ == "__main__":
    raise SystemExit(main())
