"""Picture captioning, end to end: a tiny model learns colour and count of drawn shapes.

Pictures are drawn with Pillow at the tiny models' own sizes: a grid of cells, of which one to four
hold a disc or a square of one colour. A caption is two words and a stop token; only they are
labelled. Pictures of training and of testing share no (colour, cells) combination.

    python -m conformance.captioning --model gemma4-moe --plot curve.svg
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from conformance.batches import IGNORE, Sample
from conformance.case import Model

CELL = 4  # pixels
COLOURS = {
    "red": (220, 35, 35),
    "green": (35, 200, 40),
    "blue": (40, 60, 220),
    "yellow": (220, 215, 35),
    "white": (235, 235, 235),
    "black": (20, 20, 20),
}
SHADE = 10
BATCH = 16
ABOUT = "Fine-tune a tiny model on captions of drawn pictures and print its loss curve."
BACKGROUND = (128, 128, 128)
MOST = 3
# token ids, all of them text for every tiny model
PROMPT = (20, 21)
FIRST_COLOUR, FIRST_COUNT, STOP = 30, 40, 1
UNSEEN = 64
# To the last unseen picture: steps, samples a step, and the rate that falls from there to 0.
WHOLE: dict[str, tuple[int, int, float]] = {
    "gemma4-moe": (340, 64, 5e-3),
    "gemma4-dense": (700, 32, 5e-3),
    "gemma3-vlm": (700, 32, 5e-3),
    "qwen3_5": (420, 32, 7e-3),
}
LEARNERS = ("gemma4-moe", "gemma4-dense", "gemma3-vlm", "qwen3_5")


@dataclass(frozen=True)
class Picture:
    """What is in a picture: one colour, and the cells (row by row) that hold a shape."""

    colour: str
    cells: tuple[int, ...]

    @property
    def caption(self) -> tuple[int, int, int]:
        """Token ids of colour, count and stop."""
        place = list(COLOURS).index(self.colour)
        return FIRST_COLOUR + place, FIRST_COUNT + len(self.cells), STOP


@dataclass(frozen=True)
class Task:
    """Samples to train on, and unseen pictures to be asked about, for one model."""

    train: list[Sample]
    unseen: list[Sample]


@dataclass(frozen=True)
class Layout:
    """A tiny model's picture: side and patch in pixels, and how many tokens it becomes."""

    side: int
    patch: int
    tokens: int

    @property
    def cells(self) -> int:
        """Cells in a row, and rows of them."""
        return self.side // CELL


def layout(model: Model) -> Layout:
    """The picture that fits a tiny model: its (3, H, W) input, else 8 by 8 patches.

    Raises ValueError for a model that is none of `LEARNERS`.
    """
    if model.name not in LEARNERS or model.images is None:
        raise ValueError(f"captioning: model {model.name!r} is none of {', '.join(LEARNERS)}")
    vision = model.tiny["vision_config"]
    patch = int(vision["patch_size"])
    if len(model.images.pixel_values) == 3:
        return Layout(model.images.pixel_values[1], patch, model.images.tokens_per_image)
    merged = int(vision.get("pooling_kernel_size") or vision["spatial_merge_size"])
    return Layout(8 * patch, patch, (8 // merged) ** 2)


def draw(picture: Picture, where: Layout, rng: random.Random) -> Image.Image:
    """The picture as RGB; each shape is a disc or a square, at random, of nearly the colour."""
    image = Image.new("RGB", (where.side, where.side), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for cell in picture.cells:
        row, column = divmod(cell, where.cells)
        x, y = column * CELL, row * CELL
        box = (x, y, x + CELL - 1, y + CELL - 1)
        red, green, blue = (level + rng.randint(-SHADE, SHADE) for level in COLOURS[picture.colour])
        shape = rng.choice((pen.ellipse, pen.rectangle))
        shape(box, fill=(red, green, blue))
    return image


def features(image: Image.Image, model: Model) -> Sample:
    """`pixel_values` of one picture, with what goes with them, as the family's processor lays it.

    (3, H, W) normalised to ±1; or patches (P, 3·p²) in [0, 1], row by row with their positions;
    or patches (P, 3·2·p²) in blocks of merged patches, each frame twice, with grid.
    """
    spec = model.images
    assert spec is not None
    p = layout(model).patch
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255
    pixels = raw.reshape(image.height, image.width, 3)
    if len(spec.pixel_values) == 3:
        return {"pixel_values": (pixels.permute(2, 0, 1) * 2 - 1)[None]}
    n = image.height // p
    if "image_grid_thw" in spec.extra:
        merge = model.tiny["vision_config"]["spatial_merge_size"]
        blocks = (pixels * 2 - 1).reshape(n // merge, merge, p, n // merge, merge, p, 3)
        patches = blocks.permute(0, 3, 1, 4, 6, 2, 5).reshape(n * n, 3, 1, p * p)
        patches = patches.expand(-1, -1, 2, -1).reshape(n * n, -1)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, n, n]])}
    patches = pixels.reshape(n, p, n, p, 3).permute(0, 2, 1, 3, 4).reshape(1, n * n, -1)
    y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    return {
        "pixel_values": patches,
        "image_position_ids": torch.stack([x, y], -1).reshape(1, -1, 2),
    }


def sample(picture: Picture, model: Model, rng: random.Random) -> Sample:
    """Image block, prompt and caption; labels on the caption alone."""
    spec = model.images
    assert spec is not None and spec.begin_id is not None and spec.end_id is not None
    block = [spec.begin_id, *[spec.token_id] * layout(model).tokens, spec.end_id]
    ids = torch.tensor([2, *block, *PROMPT, *picture.caption])
    labels = ids.clone()
    labels[: -len(picture.caption)] = IGNORE
    found: Sample = {"input_ids": ids, "labels": labels}
    if spec.type_ids:
        found[spec.type_ids] = (ids == spec.token_id).long()
    return found | features(draw(picture, layout(model), rng), model)


def task(model: Model, count: int = 256, seed: int = 0) -> Task:
    """`count` training samples and 64 unseen ones, no picture in both; colours and counts even."""
    rng = random.Random(seed)
    cells = range(layout(model).cells ** 2)
    groups: dict[tuple[str, int], list[Picture]] = {}
    for colour in COLOURS:
        for n in range(1, MOST + 1):
            every = [Picture(colour, c) for c in combinations(cells, n)]
            rng.shuffle(every)
            groups[colour, n] = every
    keys = list(groups)
    unseen = [groups[keys[i % len(keys)]].pop() for i in range(UNSEEN)]
    train = [rng.choice(groups[keys[i % len(keys)]]) for i in range(count)]
    rng.shuffle(train)
    return Task([sample(p, model, rng) for p in train], [sample(p, model, rng) for p in unseen])


def train_head(model: nn.Module) -> None:
    """Train the output head and the last norm as well, whatever froze them."""
    wrapped: Any = model
    inner = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    head: Any = inner.get_output_embeddings()
    head.weight.requires_grad_(True)
    norms = [
        p for name, p in model.named_parameters() if name.endswith("language_model.norm.weight")
    ]
    for parameter in norms:
        parameter.requires_grad_(True)


def train(
    model: nn.Module,
    task: Task,
    subject: Any,
    *,
    steps: int,
    batch_size: int,
    rate: float,
    decay: bool = False,
) -> list[float]:
    """AdamW over the training samples in turn; the loss of each step, before it.

    subject: collates and computes the loss (`conformance.subject.Subject`). decay: the rate falls
    linearly to 0.
    """
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    plan = subject.plan()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps) if decay else rate
        rows = [task.train[(step * batch_size + i) % len(task.train)] for i in range(batch_size)]
        batch = subject.to(subject.collate(rows, plan), subject.case.setting.dtype)
        loss = subject.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def right(model: nn.Module, samples: Sequence[Sample], subject: Any) -> float:
    """The share of captions whose every token is the most likely one, which greedy decoding gives
    just then."""
    batch = subject.to(subject.collate(samples, subject.plan()), subject.case.setting.dtype)
    labels: Tensor = batch["labels"][:, 1:]
    chosen = subject.eval_logits(model, batch)[:, :-1].argmax(-1)
    return float(((chosen == labels) | (labels == IGNORE)).all(1).float().mean())


def swapped(samples: Sequence[Sample]) -> list[Sample]:
    """Each sample with the picture of one half the list away, whose caption is another."""
    half = len(samples) // 2
    pictures = ("pixel_values", "image_position_ids", "image_grid_thw")
    return [
        sample | {key: other[key] for key in pictures if key in other}
        for sample, other in zip(samples, [*samples[half:], *samples[:half]], strict=True)
    ]


def learn(name: str, steps: int, adapters: bool = True) -> list[float]:
    """Train a tiny model through the reference's `fit` (HF Trainer); the loss of each step.

    adapters: LoRA, expert LoRA with the experts kernel where there are experts, with the head and
    the last norm; otherwise the whole decoder. Towers are frozen. Raises ValueError for a model
    that is none of `LEARNERS`.
    """
    from conformance import checkpoint
    from conformance.families import MODELS
    from conformance.implementations.reference import IMPLEMENTATION as reference
    from conformance.settings import Setting

    if name not in LEARNERS:
        raise ValueError(f"captioning: model {name!r} is none of {', '.join(LEARNERS)}")
    model = MODELS[name]
    moe = "moe" in model.traits
    tuning = ("lora-experts" if moe else "lora") if adapters else "full"
    setting = Setting(tuning=tuning, batch="images", kernels="on" if moe else "off")
    config = checkpoint.build_config(model)
    plan = reference.plan(config, setting, "single", freeze_mm_modules=True)
    ready = reference.prepare(reference.build(checkpoint.checkpoint(model), plan), plan)
    try:
        if adapters:
            train_head(ready)
        samples = task(model, BATCH * steps).train
        rate = 1e-2 if adapters else 5e-3
        done = reference.fit(ready, samples, plan, steps=steps, batch_size=BATCH, lr=rate)
    finally:
        reference.undo(ready)
    return [float(row["loss"]) for row in done.state.log_history if "loss" in row]


def curve_svg(losses: Sequence[float], title: str) -> str:
    """The loss curve as a stand-alone SVG of 460 by 240 pixels, with the first and last
    values beside it."""
    width, height, edge = 460, 240, 40
    top = max(losses)
    points = " ".join(
        f"{edge + i * (width - 2 * edge) / max(len(losses) - 1, 1):.1f},"
        f"{height - edge - loss / top * (height - 2 * edge):.1f}"
        for i, loss in enumerate(losses)
    )
    base = height - edge
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        f' font-family="sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<path d="M{edge} {edge}V{base}H{width - edge}" fill="none" stroke="#888"/>'
        f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="2"/>'
        f'<text x="{edge}" y="24">{escape(title)}</text>'
        f'<text x="{edge - 4}" y="{edge + 4}" text-anchor="end">{top:.2f}</text>'
        f'<text x="{width - edge}" y="{base - losses[-1] / top * (height - 2 * edge) - 8:.0f}"'
        f' text-anchor="end">{losses[-1]:.2f}</text>'
        f'<text x="{width / 2:.0f}" y="{height - 10}" text-anchor="middle">step</text></svg>\n'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the curve, and draw it on request; 0 when the loss ended below 1."""
    parser = argparse.ArgumentParser(prog="python -m conformance.captioning", description=ABOUT)
    parser.add_argument("--model", choices=LEARNERS, default="gemma4-moe")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--full", action="store_true", help="train the decoder, not adapters")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be positive")
    with redirect_stdout(sys.stderr):  # Trainer prints each step as a dict
        losses = learn(options.model, options.steps, adapters=not options.full)
    for step, loss in enumerate(losses):
        if step % max(len(losses) // 25, 1) == 0 or step == len(losses) - 1:
            print(f"{step + 1:5}  {loss:6.3f}  {'█' * round(loss * 10)}")
    if options.plot:
        title = f"{options.model}: captions, loss from {losses[0]:.2f} to {losses[-1]:.2f}"
        try:
            options.plot.write_text(curve_svg(losses, title))
        except OSError as error:
            print(f"--plot {options.plot}: {error.strerror}", file=sys.stderr)
            return 2
    return 0 if losses[-1] < 1.0 else 1


if __name__ == "__main__":
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    raise SystemExit(main())
