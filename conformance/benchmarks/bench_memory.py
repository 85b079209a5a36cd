"""The memory that `conformance plan` estimates for one GPU, beside what a training takes there.

    python -m conformance.benchmarks.bench_memory --out memory.json [--setting TOKENS ...]

A cell is a model widened until its tensors count, trained for three steps of AdamW in a process of
its own; the estimate is made on the meta device from the same config and plan. Both are bytes of
the allocator at the fullest moment. Records: estimated, measured (MiB) and their ratio.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from conformance.benchmarks.bench_step import WIDE_TOKENS, Cell, batch_of
from conformance.benchmarks.records import record
from conformance.benchmarks.runner import Records, in_fresh_process
from conformance.case import Case, Check
from conformance.checkpoint import checkpoint
from conformance.implementation import load
from conformance.paths import reference_package
from conformance.settings import Setting
from conformance.subject import bound

KERNEL, LIMIT_S, MODEL = "memory", 180.0, "gemma4-text-wide"
SETTINGS = (
    "-",
    "bf16",
    "bf16+ckpt-nonreentrant",
    "bf16+lora",
    "bf16+lora+ckpt-nonreentrant",
    "bf16+lora+ckpt-nonreentrant+kernels",
    "bf16+kernels",
    "bf16+offload",
    "bf16+ckpt-nonreentrant+offload-hidden_states",
)


def measure(cell: Cell) -> Records:
    """Estimated and measured bytes of one setting."""
    memory = import_module(f"{reference_package()}.memory")
    setting = Setting.parse(cell.setting)
    case = Case(Check("B02"), cell.spec, setting)
    with bound(load(cell.provider), case, cell.device) as subject:
        plan = subject.plan()
        built = subject.impl.build(checkpoint(cell.spec), plan).to(cell.device)
        expected = memory.estimate(built.config, plan, 1, tokens=WIDE_TOKENS, device=cell.device)
        model = subject.adopt(built, plan, adapters=setting.tuning != "full")
        batch = batch_of(subject, plan)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for _ in range(3):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            optimizer.zero_grad(set_to_none=True)
            subject.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    more = {"shape": cell.model, "dtype": setting.dtype, "seed": 0}
    rows = [
        ("estimated", "MiB", [expected.total / 2**20]),
        ("measured", "MiB", [peak / 2**20]),
        ("estimated over measured", "ratio", [expected.total / peak]),
    ]
    return [
        record(KERNEL, cell.provider, cell.setting, *row, x_value=WIDE_TOKENS, **more)
        for row in rows
    ]


def main() -> int:
    """Measure, print, write the records; status 1 where no setting could be measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", nargs="*", default=list(SETTINGS))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for setting in arguments.setting:
        got = in_fresh_process(measure, Cell(MODEL, setting, "reference", "cuda"), LIMIT_S)
        if isinstance(got, str):
            print(f"{setting}: {got}", flush=True)
            continue
        rows += got
        arguments.out.write_text(json.dumps(rows, indent=0) + "\n")
        print(setting, *(f"{r['metric']} {r['median']:.4g}" for r in got), flush=True)
    return 0 if rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
