"""Linear cross-entropy, forward and backward: time, workspace and error of every provider.

    python -m conformance.benchmarks.bench_cross_entropy --out records.json [--seconds 300]

Rules (kernels.md section 11): one cell a process; providers interleaved over the rounds; L2 flushed
before each timed call; device events; 3 warm-ups, 10 timed calls, median and quintiles; workspace =
peak minus what was there before minus what the caller gets back, in the dtype it accumulates in;
ceilings and the products alone measured in the same run; correctness of the timed configuration
against float64, beside the eager bf16 error, before timing. A provider that does not install or
raises is recorded with its reason.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from conformance.paths import reference_package

# Hidden size, vocabulary, softcap.
SHAPES = {"gemma4": (2816, 262144, 30.0), "qwen3.5": (2048, 248320, None)}
PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy")
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


PROVIDERS: dict[str, Callable[[], Loss]] = {
    "reference": _reference,
    "reference-lean": lambda: _reference(mode="lean"),
    "reference-640": lambda: _reference(memory_budget=640 << 20),
    "full-logits": lambda: _eager,
    "torch.compile": lambda: torch.compile(_eager),
    "liger": _liger,
    "cce": _cut,
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


def error(x: Inputs, loss: Loss) -> tuple[float, float]:
    """Relative Frobenius error of the hidden gradient on 128 rows: the provider's and eager's."""
    valid = int((x.labels != -100).sum())
    rows = (x.labels != -100).nonzero().squeeze(1)[:: max(1, valid // 128)][:128]
    loss(x).backward()
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


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    t = torch.tensor(times, dtype=torch.float64)
    low, mid, high = torch.quantile(t, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return mid, low, high


def timed(step: Callable[[], object], repeats: int = 10, warmups: int = 3) -> list[float]:
    """Milliseconds of each call, the second-level cache flushed before it."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    times = []
    for i in range(warmups + repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if i >= warmups:
            times.append(start.elapsed_time(end))
    return times


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

    return timed(step)


def ceilings() -> Iterator[tuple[str, str, list[float]]]:
    """(metric, unit, values) of a large product and a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    yield "matmul8192", "TFLOP/s", [2 * 8192**3 / t / 1e9 for t in timed(lambda: a @ b)]
    c = torch.empty(1 << 29, dtype=torch.int32, device="cuda")
    d = torch.empty_like(c)
    yield "copy", "TB/s", [2 * c.numel() * 4 / t / 1e9 for t in timed(lambda: d.copy_(c))]


def record(cell: Cell | None, metric: str, unit: str, values: list[float]) -> dict[str, Any]:
    """One flat record (kernels.md section 11); the only place that knows the layout."""
    mid, low, high = quantiles(values)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "kernel": "linear_cross_entropy",
        "provider": cell.provider if cell else "device",
        "mode": cell.mode if cell else "ceiling",
        "metric": metric,
        "unit": unit,
        "x_name": "tokens",
        "x_value": cell.tokens if cell else 0,
        "median": mid,
        "p20": low,
        "p80": high,
        "shape": cell.shape if cell else "",
        "dtype": "bfloat16",
        "seed": 0,
        "device": torch.cuda.get_device_name(),
        "clocks": "as found",
        "versions": versions,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def measure(cell: Cell | None) -> list[dict[str, Any]]:
    """Every record of one cell (None: the ceilings); runs in a process of its own."""
    if cell is None:
        return [record(None, *values) for values in ceilings()]
    if cell.provider == "products":
        return [record(cell, "forward+backward", "ms", products(cell))]
    began = time.monotonic()
    loss, x = PROVIDERS[cell.provider](), make_inputs(cell)

    def step() -> None:
        x.hidden.grad = x.weight.grad = None
        loss(x).backward()

    got, eager = error(x, loss)
    ready = time.monotonic() - began
    step()
    space = workspace(x, step, cell.provider in WIDE)
    times = timed(step)
    return [
        record(cell, "forward+backward", "ms", times),
        record(cell, "workspace", "MiB", [space]),
        record(cell, "hidden gradient error", "relative", [got]),
        record(cell, "eager hidden gradient error", "relative", [eager]),
        record(cell, "first call (compiling, tuning, check)", "s", [ready]),
    ]


def _child(cell: Cell | None, pipe: Any) -> None:
    """Process body: send the records or the reason why there are none."""
    try:
        pipe.send(measure(cell))
    except Exception as problem:
        pipe.send(f"{type(problem).__name__}: {str(problem).splitlines()[:1]}")


def run_cell(cell: Cell | None, limit: float) -> list[dict[str, Any]]:
    """Measure a cell in a fresh fork of this process, which never touches the GPU itself."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(cell, theirs))
    child.start()
    answer: Any = ours.recv() if ours.poll(limit) else f"no answer in {limit:.0f} s"
    child.join(5)
    if child.is_alive():
        child.kill()
    if isinstance(answer, str):
        print("  failed:", answer, flush=True)
        return [
            {"kernel": "linear_cross_entropy", "failed": answer, **(asdict(cell) if cell else {})}
        ]
    records: list[dict[str, Any]] = answer
    return records


def plan() -> list[Cell | None]:
    """Cells in the order of their worth, so that a short run has the important ones."""
    cells: list[Cell | None] = [None]
    bars = ("reference", "torch.compile")
    for round_ in range(2):
        for provider in ("products", *bars, "reference-lean"):
            cells += [Cell(shape, 8192, False, 0.0, provider) for shape in SHAPES]
        cells.append(Cell("qwen3.5", 8192, False, 0.0, "reference-640"))
        for provider in ("products", *bars):
            cells += [Cell(shape, 8192, True, 0.0, provider) for shape in SHAPES]
        cells += [Cell(shape, 8192, False, 0.5, "reference") for shape in SHAPES]
        if round_ == 0:
            for provider in ("cce", "liger", "full-logits"):
                cells += [Cell(shape, 8192, False, 0.0, provider) for shape in SHAPES]
    for provider in ("cce", "liger", "full-logits"):
        cells += [Cell(shape, 8192, True, 0.0, provider) for shape in SHAPES]
    cells += [
        Cell(shape, 8192, train, 0.0, "cce-exact") for train in (False, True) for shape in SHAPES
    ]
    for tokens in (4096, 16384, 32768):
        for provider in bars if tokens < 32768 else bars[:1]:
            for trainable in (False, True):
                cells += [Cell(shape, tokens, trainable, 0.0, provider) for shape in SHAPES]
    return cells


def main() -> None:
    """Run the cells, write the records after each, print a short table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1800.0, help="start no cell after this")
    arguments = parser.parse_args()
    began, records = time.monotonic(), []
    for cell in plan():
        left = arguments.seconds - (time.monotonic() - began)
        if left <= 0:
            print("out of time; the remaining cells were not run")
            break
        got = run_cell(cell, max(left, 60.0))
        records += got
        arguments.out.write_text(json.dumps(records, indent=0))
        for row in got:
            if row.get("metric") in ("forward+backward", "workspace", "matmul8192", "copy"):
                where = f"{row['shape']:8} {row['x_value']:6} {row['mode']:20} {row['provider']:15}"
                print(where, f"{row['metric']:17} {row['median']:9.2f} {row['unit']}", flush=True)


if __name__ == "__main__":
    main()
