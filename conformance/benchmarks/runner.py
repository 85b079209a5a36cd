"""How a benchmark measures: a fresh process a cell, device events, a flushed cache, workspace.

The parent never touches the GPU, so that a fork of it starts with everything imported and nothing
allocated: fragmentation left by one cell cannot enter the next.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
# Writes before a timed call: beside flushing the cache they keep the device busy while the host
# enqueues the first launches, as the layers before do in training. The same for every provider.
FLUSHES = 24

Records = list[dict[str, Any]]


def timed(step: Callable[[], object], repeats: int = 20, warmups: int = 3) -> list[float]:
    """Milliseconds of each call between device events, the second-level cache flushed before it."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(warmups + repeats):
        for _ in range(FLUSHES):
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = step()
        end.record()
        torch.cuda.synchronize()
        del result
        if i >= warmups:
            times.append(start.elapsed_time(end))
    return times


def host(step: Callable[[], object], repeats: int = 10) -> list[float]:
    """Milliseconds the host takes to enqueue each call."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = step()
        times.append((time.perf_counter() - began) * 1e3)
        torch.cuda.synchronize()
        del result
    return times


def memory(step: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[float, float]:
    """MiB at a step's peak beyond what was there: with and without what the caller gets back."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    returned = sum(tensor.numel() * tensor.element_size() for tensor in result)
    return peak / 2**20, (peak - returned) / 2**20


def ceilings() -> Iterator[tuple[str, str, list[float]]]:
    """(metric, unit, values) of a large bf16 product and of a large copy, read plus written."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    yield "matmul8192", "TFLOP/s", [2 * 8192**3 / t / 1e9 for t in timed(lambda: a @ b)]
    c = torch.empty(1 << 29, dtype=torch.int32, device="cuda")
    d = torch.empty_like(c)
    yield "copy", "TB/s", [2 * c.numel() * 4 / t / 1e9 for t in timed(lambda: d.copy_(c))]


def in_fresh_process(measure: Callable[[Any], Records], cell: Any, limit: float) -> Records | str:
    """``measure(cell)`` in a fork of its own; a reason, in words, where there are no records."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(measure, cell, theirs))
    child.start()
    theirs.close()
    try:
        answer: Records | str = ours.recv() if ours.poll(limit) else f"no answer in {limit:.0f} s"
    except EOFError:
        answer = "the process died without a word"
    child.join(5)
    if child.is_alive():
        child.kill()
    return answer


def run_cells(
    cells: Sequence[Any],
    measure: Callable[[Any], Records],
    finish: Callable[[Records], Records],
    out: Path,
    seconds: float,
    kernel: str,
) -> Records:
    """Measure each cell (a dataclass) in a process of its own and print a line of it; start none
    after so many seconds. The records, as `finish` completes them, are written after each."""
    began, records = time.monotonic(), []
    for cell in cells:
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            print("out of time; the remaining cells were not run")
            break
        got = in_fresh_process(measure, cell, max(left, 60.0))
        name = " ".join(str(value) for value in vars(cell).values())
        if isinstance(got, str):
            print(f"{name} failed: {got}", flush=True)
            got = [{"kernel": kernel, "failed": got, **vars(cell)}]
        records += got
        out.write_text(json.dumps(finish(records), indent=0) + "\n")
        figures = [f"{r['metric']} {r['median']:.4g} {r['unit']}" for r in got if "metric" in r]
        print(f"{name}  {'  '.join(figures)}", flush=True)
    return finish(records)


def _child(measure: Callable[[Any], Records], cell: Any, pipe: Any) -> None:
    """The body of a cell's process."""
    try:
        pipe.send(measure(cell))
    except Exception as error:  # a peer may fail in any way; that is a result too
        lines = str(error).strip().splitlines() or [""]
        pipe.send(f"{type(error).__name__}: {lines[0][:300]}")
