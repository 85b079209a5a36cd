"""Mixture-of-experts with LoRA, forward and backward: time, memory and error of every provider.

    python -m conformance.benchmarks.bench_experts --out records.json [--seconds 300]
           [--provider NAME ...] [--shape NAME ...] [--part main|sizes|all]

Rules (`kernels.md` §11): one cell a process; providers interleaved over the rounds; the cache
flushed before each timed call, for long enough that the host is ahead (its own time is a figure
apart); device events, 3 warm-ups, 20 timed calls, median and quintiles;
memory at the peak with and without what the caller gets back; ceilings in the same run, and the
share of the floor that follows from them; the timed configuration is compared with float64 on a few
tokens before timing. bf16 weights, activations and adapters, float32 routing weights, frozen
experts. A provider that does not install or raises is recorded with its reason.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conformance.benchmarks.experts_peers import PROVIDERS, Inputs, activate
from conformance.benchmarks.records import record
from conformance.benchmarks.runner import (
    Records,
    ceilings,
    host,
    memory,
    run_cells,
    timed,
)

# Experts, H, I, K, activation.
SHAPES: dict[str, tuple[int, int, int, int, str]] = {
    "gemma4-26B-A4B": (128, 2816, 704, 8, "gelu_tanh"),
    "qwen3.5-35B-A3B": (256, 2048, 512, 8, "silu"),
    "mixtral-8x7b": (8, 4096, 14336, 2, "silu"),
    "qwen3-30B-A3B": (128, 2048, 768, 8, "silu"),
}
KERNEL = "experts+lora"
SKEW = 7000  # rows that one expert gets under skewed routing


@dataclass(frozen=True)
class Cell:
    """One measurement; provider "device" measures the ceilings."""

    shape: str
    tokens: int
    rank: int
    routing: str  # even, skewed
    provider: str
    device: str = "cuda"

    @property
    def mode(self) -> str:
        """The record's mode column."""
        return f"r{self.rank}" + ("" if self.routing == "even" else f"+{self.routing}")


def make_inputs(cell: Cell, sizes: tuple[int, int, int, int, str], seed: int = 0) -> Inputs:
    """Random inputs on the device, the same for every provider of a cell."""
    experts, width, inner, top_k, act = sizes
    generator = torch.Generator(cell.device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, grad: bool = True) -> torch.Tensor:
        out = torch.empty(shape, device=cell.device, dtype=torch.bfloat16)
        return out.normal_(0, std, generator=generator).requires_grad_(grad)

    scores = torch.rand(cell.tokens, experts, device=cell.device, generator=generator)
    if cell.routing == "skewed":
        scores[:SKEW, 0], scores[SKEW:, 0] = 2.0, -1.0
    weights = torch.rand(cell.tokens, top_k, device=cell.device, generator=generator)
    rank = cell.rank
    return Inputs(
        hidden=normal(cell.tokens, width),
        index=scores.topk(top_k, dim=1).indices,
        weights=weights.requires_grad_(),
        gate_up=normal(experts, 2 * inner, width, std=width**-0.5, grad=False),
        down=normal(experts, width, inner, std=inner**-0.5, grad=False),
        a_up=normal(rank * experts, width, std=width**-0.5),
        b_up=normal(2 * inner, rank * experts, std=0.05),
        a_down=normal(rank * experts, inner, std=inner**-0.5),
        b_down=normal(width, rank * experts, std=0.05),
        scale=2.0,
        act=act,
    )


def truth(x: Inputs, grad: torch.Tensor, tokens: list[int]) -> list[torch.Tensor]:
    """float64 output and hidden gradient of a few tokens, slot by slot; tokens are independent."""
    experts = x.gate_up.shape[0]
    outputs, gradients = [], []
    for t in tokens:
        h = x.hidden.detach()[t].double().requires_grad_()
        with torch.enable_grad():
            total = torch.zeros_like(h)
            for e, w in zip(x.index[t].tolist(), x.weights[t].detach().double(), strict=True):
                a, b = (
                    p.detach().double()
                    for p in (
                        x.a_up.view(experts, -1, x.a_up.shape[1])[e],
                        x.b_up.view(x.b_up.shape[0], -1, experts)[:, :, e],
                    )
                )
                gate, up = (x.gate_up[e].double() @ h + x.scale * (b @ (a @ h))).chunk(2)
                mid = activate(gate, x.act) * up
                a, b = (
                    p.detach().double()
                    for p in (
                        x.a_down.view(experts, -1, x.a_down.shape[1])[e],
                        x.b_down.view(x.b_down.shape[0], -1, experts)[:, :, e],
                    )
                )
                total = total + w * (x.down[e].double() @ mid + x.scale * (b @ (a @ mid)))
        gradients.append(torch.autograd.grad(total, h, grad[t].double())[0])
        outputs.append(total.detach())
    return [torch.stack(outputs), torch.stack(gradients)]


def floor(cell: Cell, sizes: tuple[int, int, int, int, str], tflops: float, tbs: float) -> float:
    """Milliseconds that no implementation of these products beats (`kernels.md` §6): both passes.

    A pass takes the larger of its operations over the product ceiling and its bytes over the copy
    ceiling. Bytes: weights, adapters and what is saved once; inputs and outputs once; what one
    product writes and the next reads (h and y; dh, h, dGU and dX by slot) twice.
    """
    experts, width, inner, top_k, _ = sizes
    slots, rank, token_bytes = cell.tokens * top_k, cell.rank, cell.tokens * width * 2
    weights, y, h = 3 * experts * width * inner * 2, slots * width * 2, slots * inner * 2
    adapters = experts * rank * (2 * width + 3 * inner)
    flops = 6 * slots * inner * width + 2 * slots * rank * (2 * width + 3 * inner)
    forward = weights + 3 * token_bytes + 2 * h + 2 * h + 2 * y
    more_flops = flops + 2 * slots * rank * (2 * width + 3 * inner)
    backward = weights + 3 * token_bytes + 2 * h + 2 * 2 * h + 2 * y + 4 * h + 6 * adapters
    return max(flops / tflops, forward / tbs) / 1e9 + max(more_flops / tflops, backward / tbs) / 1e9


def measure(cell: Cell) -> Records:
    """Every record of one cell; runs in a process of its own."""
    if cell.provider == "device":
        return [record(KERNEL, "device", "ceiling", *row) for row in ceilings()]
    x = make_inputs(cell, SHAPES[cell.shape])
    generator = torch.Generator("cuda").manual_seed(1)
    grad = torch.randn(x.hidden.shape, device="cuda", generator=generator).to(torch.bfloat16)
    layer = PROVIDERS[cell.provider]()
    torch.cuda.synchronize()
    began = time.monotonic()
    step, got = _first_call(cell, layer, x, grad)
    ready = time.monotonic() - began
    tokens = list(range(0, cell.tokens, cell.tokens // 8))
    errors = [
        float((g[tokens].double() - t).norm() / t.norm())
        for g, t in zip(got, truth(x, grad, tokens), strict=True)
    ]
    del got
    peak, workspace = memory(step)
    rows = [
        ("forward+backward", "ms", timed(step)),
        ("host", "ms", host(step)),
        ("peak", "MiB", [peak]),
        ("workspace", "MiB", [workspace]),
        ("output error", "relative", errors[:1]),
        ("hidden gradient error", "relative", errors[1:]),
        ("first call", "s", [ready]),
    ]
    more = {"shape": cell.shape, "rank": cell.rank, "dtype": "bfloat16", "seed": 0}
    return [
        record(KERNEL, cell.provider, cell.mode, *row, x_value=cell.tokens, **more) for row in rows
    ]


def _first_call(cell: Cell, layer: Any, x: Inputs, grad: torch.Tensor) -> tuple[Any, Any]:
    """The step to time; output and hidden gradient of its first run, which compiles and tunes."""
    out = layer(x)
    leaves = list(x.leaves)
    model = getattr(layer, "model", None)
    if model:
        (built,) = model.values()
        leaves = [*leaves[:2], *(p for p in built.parameters() if p.requires_grad)]
    elif cell.provider.startswith("liger"):
        leaves = leaves[:2]

    def step() -> tuple[torch.Tensor, ...]:
        result = layer(x)
        return (result.detach(), *torch.autograd.grad(result, leaves, grad))

    first = torch.autograd.grad(out, leaves, grad)
    torch.cuda.synchronize()
    return step, (out.detach(), first[0].detach())


def plan(shapes: list[str], providers: list[str], part: str) -> list[Cell]:
    """Cells in the order of their worth: two interleaved rounds of ours and the best peer, the
    other peers once, then ours and the best peer at other sizes and ranks."""

    def tokens(shape: str) -> int:
        return 4096 if shape == "mixtral-8x7b" else 8192

    cells = [Cell("", 0, 0, "", "device")]
    best = [p for p in providers if p in ("reference", "grouped_mm+split")]
    if part in ("main", "all"):
        for _ in range(2):
            for provider in best:
                cells += [Cell(shape, tokens(shape), 16, "even", provider) for shape in shapes]
                if "gemma4-26B-A4B" in shapes:
                    cells.append(Cell("gemma4-26B-A4B", 8192, 16, "skewed", provider))
        for provider in (p for p in providers if p not in best):
            cells += [Cell(shape, tokens(shape), 16, "even", provider) for shape in shapes]
    if part in ("sizes", "all"):
        for shape in shapes:
            sizes = [t for t in (4096, 8192, 16384, 32768) if t != tokens(shape)]
            for provider in best:
                cells += [Cell(shape, t, 16, "even", provider) for t in sizes]
                cells += [Cell(shape, tokens(shape), r, "even", provider) for r in (8, 64)]
    return cells


def first_cells() -> list[Cell]:
    """What `pytest -m bench` measures: ours and the best peer, once."""
    best = ["reference", "grouped_mm+split"]
    return plan(list(SHAPES), best, "main")[: 1 + 2 * (len(SHAPES) + 1)]


def with_floors(records: Records) -> Records:
    """Add what share of the floor each time reaches, from the ceilings of the same run."""
    top = {r["metric"]: r["median"] for r in records if r.get("provider") == "device"}
    if not {"matmul8192", "copy"} <= top.keys():
        return records
    shares = []
    for row in records:
        if row.get("metric") == "forward+backward":
            routing = "skewed" if "skewed" in row["mode"] else "even"
            cell = Cell(row["shape"], row["x_value"], row["rank"], routing, row["provider"])
            least = floor(cell, SHAPES[cell.shape], top["matmul8192"], top["copy"])
            share = {"metric": "share of floor", "unit": "ratio", "floor_ms": least}
            figures = {k: least / row[k] for k in ("median", "p20", "p80")}
            shares.append({**row, **share, **figures})
    return records + shares


def main() -> None:
    """Run the cells, write the records after each, print a short table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800.0, help="start no cell after this")
    parser.add_argument("--provider", nargs="*", default=list(PROVIDERS))
    parser.add_argument("--shape", nargs="*", default=list(SHAPES))
    parser.add_argument(
        "--part",
        choices=("main", "sizes", "all"),
        default="all",
        help="sizes: 4k to 32k tokens, ranks 8 and 64, of ours and the best peer",
    )
    arguments = parser.parse_args()
    cells = plan(arguments.shape, arguments.provider, arguments.part)
    run_cells(cells, measure, with_floors, arguments.out, arguments.seconds, KERNEL)


if __name__ == "__main__":
    main()
