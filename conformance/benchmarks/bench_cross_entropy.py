"""Linear cross-entropy, forward and backward: time, workspace and error of every provider.

    python -m conformance.benchmarks.bench_cross_entropy --out records.json [--seconds 300]
           [--part main|sizes|all] [--provider P ..] [--shape S ..] [--tokens N ..] [--mode M ..]

Rules (kernels.md section 11): one cell a process; providers interleaved over the rounds; L2 flushed
before each timed call; device events; 3 warm-ups, 10 timed calls, median and quintiles; workspace =
peak minus what was there before minus what the caller gets back, in the dtype it accumulates in;
ceilings and the products alone measured in the same run; correctness of the timed configuration
against float64, beside the eager bf16 error, before timing. A provider that does not install or
raises is recorded with its reason.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from conformance.benchmarks.records import record
from conformance.benchmarks.runner import Records, ceilings, run_cells, timed
from conformance.paths import reference_package

# Hidden size, vocabulary, softcap.
SHAPES = {"gemma4": (2816, 262144, 30.0), "qwen3.5": (2048, 248320, None)}
KERNEL = "linear_cross_entropy"
SIZES = (16384, 4096, 32768)
MODES = ("frozen", "trainable", "frozen+ignored0.50", "trainable+ignored0.50")
CHECKED = 8192  # tokens at which the weight's gradient is compared with float64: it takes seconds
STD = 0.02  # of the weights: logits of standard deviation about 1


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    shape: str
    tokens: int
    trainable: bool
    ignored: float  # share of labels
    provider: str

    @property
    def mode(self) -> str:
        """The record's mode column."""
        head = "trainable" if self.trainable else "frozen"
        return head if self.ignored == 0 else f"{head}+ignored{self.ignored:.2f}"


@dataclass(frozen=True)
class Inputs:
    """What a provider gets."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    softcap: float | None


Loss = Callable[[Inputs], torch.Tensor]


def _eager(x: Inputs) -> torch.Tensor:
    """Full logits in bf16, loss in fp32, as transformers does."""
    z = x.hidden @ x.weight.t()
    if x.softcap is not None:
        z = torch.tanh(z / x.softcap) * x.softcap
    return torch.nn.functional.cross_entropy(z.float(), x.labels)


def _reference(**options: Any) -> Loss:
    """The reference implementation with the given options."""
    module = import_module(f"{reference_package()}.kernels.cross_entropy")

    def loss(x: Inputs) -> torch.Tensor:
        result: torch.Tensor = module.linear_cross_entropy(
            x.hidden, x.weight, x.labels, softcap=x.softcap, **options
        )
        return result

    return loss


def _liger() -> Loss:
    """Liger's fused linear cross-entropy."""
    module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")

    def loss(x: Inputs) -> torch.Tensor:
        layer = module.LigerFusedLinearCrossEntropyLoss(softcap=x.softcap)
        result: torch.Tensor = layer(x.weight, x.hidden, x.labels)
        return result

    return loss


def _cut(**options: Any) -> Loss:
    """Apple's cut cross-entropy; with `filter_eps=None` nothing of the gradient is skipped."""
    module = import_module("cut_cross_entropy")

    def loss(x: Inputs) -> torch.Tensor:
        result: torch.Tensor = module.linear_cross_entropy(
            x.hidden, x.weight, x.labels, softcap=x.softcap, **options
        )
        return result

    return loss


def _torchs() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(x: Inputs) -> torch.Tensor:
        if x.softcap is not None:
            raise ValueError("torch's own has no softcap")
        return torch.nn.functional.linear_cross_entropy(
            x.hidden, x.weight, x.labels, options=options
        )

    return loss


PROVIDERS: dict[str, Callable[[], Loss]] = {
    "reference": _reference,
    "reference-lean": lambda: _reference(mode="lean"),
    "reference-640": lambda: _reference(memory_budget=640 << 20),
    "full-logits": lambda: _eager,
    "torch.compile": lambda: torch.compile(_eager),
    "liger": _liger,
    "cce": _cut,
    "torch.linear_cross_entropy": _torchs,
    "cce-exact": lambda: _cut(filter_eps=None),
}
# Providers whose weight gradient is accumulated in fp32: that accumulator is what comes back.
WIDE = ("reference", "reference-lean", "reference-640")


def make_inputs(cell: Cell, seed: int = 0) -> Inputs:
    """Random inputs on the GPU, the same for every provider of a cell."""
    dim, vocabulary, softcap = SHAPES[cell.shape]
    gen = torch.Generator("cuda").manual_seed(seed)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.empty(cell.tokens, dim, **options).normal_(0, 1, generator=gen)
    weight = torch.empty(vocabulary, dim, **options).normal_(0, STD, generator=gen)
    labels = torch.randint(0, vocabulary, (cell.tokens,), device="cuda", generator=gen)
    drop = torch.rand(cell.tokens, device="cuda", generator=gen) < cell.ignored
    labels.masked_fill_(drop, -100)
    hidden.requires_grad_()
    weight.requires_grad_(cell.trainable)
    return Inputs(hidden, weight, labels, softcap)


def exact_rows(x: Inputs, rows: torch.Tensor, valid: int, eager: bool) -> torch.Tensor:
    """Hidden gradient of the given rows: float64, or the eager bf16 yardstick, by formula."""
    dtype = torch.bfloat16 if eager else torch.float64
    h = x.hidden.detach()[rows].to(dtype).requires_grad_()
    with torch.enable_grad():
        z = h @ x.weight.detach().to(dtype).t()
        if x.softcap is not None:
            z = torch.tanh(z / x.softcap) * x.softcap
        z = z.float() if eager else z
        loss = torch.nn.functional.cross_entropy(z, x.labels[rows], reduction="sum") / valid
    (grad,) = torch.autograd.grad(loss, h)
    return grad.double()


def error(x: Inputs) -> tuple[float, float]:
    """Relative Frobenius error of the hidden gradient (already computed) on 128 rows: the
    provider's and eager's."""
    valid = int((x.labels != -100).sum())
    rows = (x.labels != -100).nonzero().squeeze(1)[:: max(1, valid // 128)][:128]
    assert x.hidden.grad is not None
    got = x.hidden.grad[rows].double()
    truth = exact_rows(x, rows, valid, eager=False)
    yardstick = exact_rows(x, rows, valid, eager=True)
    norm = truth.norm()
    return float((got - truth).norm() / norm), float((yardstick - truth).norm() / norm)


def weight_error(x: Inputs, rows: int = 128) -> tuple[float, float]:
    """Relative Frobenius error of the weight's gradient (already computed) on some of its rows,
    labels' rows among them: the provider's, and that of eager bf16 logits, against float64."""
    weight, dim = x.weight.detach(), x.weight.shape[1]
    valid = (x.labels != -100).nonzero().squeeze(1)
    some = torch.cat([x.labels[valid[: rows // 2]], torch.arange(rows // 2, device="cuda") * 1999])
    some = some.unique()
    wide = weight.double()
    truth = torch.zeros(len(some), dim, device="cuda", dtype=torch.float64)
    low = torch.zeros(len(some), dim, device="cuda")
    for at in valid.split(256):
        h, labels = x.hidden.detach()[at], x.labels[at]
        hot = (some[None, :] == labels[:, None]).double()
        z = h.double() @ wide.t()
        raw = h @ weight.t()
        if x.softcap is not None:
            z = torch.tanh(z / x.softcap) * x.softcap
        p = torch.exp(z[:, some] - z.logsumexp(1, keepdim=True)) - hot
        if x.softcap is not None:
            p = p * (1 - (z[:, some] / x.softcap) ** 2)
        truth += p.t() @ h.double()
        eager = raw.requires_grad_()
        with torch.enable_grad():
            capped = eager if x.softcap is None else torch.tanh(eager / x.softcap) * x.softcap
            total = torch.nn.functional.cross_entropy(capped.float(), labels, reduction="sum")
            (dz,) = torch.autograd.grad(total / len(valid), eager)
        low += dz[:, some].t().float() @ h.float()
    truth /= len(valid)
    assert x.weight.grad is not None
    got, eager_rows = x.weight.grad[some].double(), low.bfloat16().double()
    norm = truth.norm()
    return float((got - truth).norm() / norm), float((eager_rows - truth).norm() / norm)


def workspace(x: Inputs, step: Callable[[], object], wide: bool) -> float:
    """MiB beyond the inputs and what the caller gets back."""
    x.hidden.grad = x.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    returned = 4
    for grad in (x.hidden.grad, x.weight.grad):
        if grad is not None:
            size = 4 if wide and grad is x.weight.grad else grad.element_size()
            returned += grad.numel() * size
    return (torch.cuda.max_memory_allocated() - before - returned) / 2**20


def products(cell: Cell, chunk: int = 1024) -> list[float]:
    """The two (three with a trainable head) products alone, by whole rows of a chunk."""
    x = make_inputs(cell)
    h, w = x.hidden.detach(), x.weight.detach()
    count = int((x.labels != -100).sum())
    z = torch.randn(chunk, w.shape[0], device="cuda", dtype=torch.bfloat16)
    dh = torch.empty(chunk, h.shape[1], device="cuda", dtype=torch.bfloat16)
    dw = torch.empty_like(w, dtype=torch.float32) if cell.trainable else None

    def step() -> None:
        for start in range(0, count, chunk):
            n = min(chunk, count - start)
            torch.mm(h[start : start + n], w.t(), out=z[:n])
            torch.mm(z[:n], w, out=dh[:n])
            if dw is not None:
                part = z[:n].t(), h[start : start + n]
                torch.addmm(dw, *part, out_dtype=torch.float32, out=dw)

    return timed(step, repeats=10)


def measure(cell: Cell) -> Records:
    """Every record of one cell; runs in a process of its own."""
    if cell.provider == "device":
        return [record(KERNEL, "device", "ceiling", *row, shape="") for row in ceilings()]
    more: dict[str, Any] = {"shape": cell.shape, "dtype": "bfloat16", "seed": 0}
    if cell.provider == "products":
        rows: list[tuple[str, str, list[float]]] = [("forward+backward", "ms", products(cell))]
    else:
        rows = _figures(cell)
    return [
        record(KERNEL, cell.provider, cell.mode, *row, x_value=cell.tokens, **more) for row in rows
    ]


def _figures(cell: Cell) -> list[tuple[str, str, list[float]]]:
    """Errors of the timed configuration, its time and its workspace."""
    began = time.monotonic()
    loss, x = PROVIDERS[cell.provider](), make_inputs(cell)

    def step() -> None:
        x.hidden.grad = x.weight.grad = None
        loss(x).backward()

    step()
    torch.cuda.synchronize()
    ready = time.monotonic() - began
    got, eager = error(x)
    errors = [
        ("hidden gradient error", "relative", [got]),
        ("eager hidden gradient error", "relative", [eager]),
    ]
    if cell.trainable and cell.tokens == CHECKED:
        got, eager = weight_error(x)
        errors += [
            ("weight gradient error", "relative", [got]),
            ("eager weight gradient error", "relative", [eager]),
        ]
    torch.cuda.empty_cache()
    space = workspace(x, step, cell.provider in WIDE)
    return [
        ("forward+backward", "ms", timed(step, repeats=10)),
        ("workspace", "MiB", [space]),
        *errors,
        ("first call", "s", [ready]),
    ]


def plan(part: str) -> list[Cell]:
    """Cells in the order of their worth, so that a short run has the important ones."""

    def each(provider: str, trainable: bool, ignored: float = 0.0, tokens: int = 8192) -> None:
        cells.extend(Cell(shape, tokens, trainable, ignored, provider) for shape in SHAPES)

    cells = [Cell("", 0, False, 0.0, "device")]
    bars = ("reference", "torch.compile")
    for _ in range(2 if part in ("main", "all") else 0):
        for trainable in (False, True):
            for provider in ("products", *bars):
                each(provider, trainable)
        each("reference-lean", False)
        cells.append(Cell("qwen3.5", 8192, False, 0.0, "reference-640"))
        each("reference", False, ignored=0.5)
        each("reference", True, ignored=0.5)
    if part in ("main", "all"):
        for trainable in (False, True):
            for provider in (
                "cce",
                "liger",
                "full-logits",
                "torch.linear_cross_entropy",
                "cce-exact",
            ):
                each(provider, trainable)
    if part in ("sizes", "all"):
        sizes = ((i, t, n) for i in (0.0, 0.5) for t in (False, True) for n in SIZES)
        for ignored, trainable, tokens in sizes:
            for provider in bars:
                each(provider, trainable, ignored, tokens)
        for trainable in (False, True):
            each("torch.compile", trainable, 0.5)
    return cells


def first_cells() -> list[Cell]:
    """What `pytest -m bench` measures: the products, ours and the best peer, once."""
    return plan("main")[: 1 + 6 * len(SHAPES)]


def with_floors(records: Records) -> Records:
    """Add what share of the floor each time reaches: two products of all valid tokens for a frozen
    head, three for a trainable one, at the ceiling of the same run."""
    top = [r["median"] for r in records if r.get("metric") == "matmul8192"]
    if not top:
        return records
    shares = []
    for row in records:
        if row.get("metric") == "forward+backward":
            dim, vocabulary, _ = SHAPES[row["shape"]]
            head, _, ignored = row["mode"].partition("+ignored")
            tokens = row["x_value"] * (1 - float(ignored or 0))
            least = 2 * (3 if head == "trainable" else 2) * tokens * vocabulary * dim / top[0] / 1e9
            share = {"metric": "share of floor", "unit": "ratio", "floor_ms": least}
            shares.append({**row, **share, **{k: least / row[k] for k in ("median", "p20", "p80")}})
    return records + shares


def main() -> None:
    """Run the cells, write the records after each, print a short table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800.0, help="start no cell after this")
    parser.add_argument("--part", choices=("main", "sizes", "all"), default="all")
    parser.add_argument("--provider", nargs="*", default=[*PROVIDERS, "products"])
    parser.add_argument("--shape", nargs="*", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=[8192, *SIZES])
    parser.add_argument("--mode", nargs="*", default=list(MODES), help=f"of {', '.join(MODES)}")
    asked = parser.parse_args()
    cells = [
        cell
        for cell in plan(asked.part)
        if cell.provider == "device"
        or all(
            getattr(cell, name) in getattr(asked, name)
            for name in ("provider", "shape", "tokens", "mode")
        )
    ]
    run_cells(cells, measure, with_floors, asked.out, asked.seconds, KERNEL)


if __name__ == "__main__":
    main()
