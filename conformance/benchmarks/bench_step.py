"""One training step: its time, tokens per second and peak memory; loading: time and peak memory.

    python -m conformance.benchmarks.bench_step --out step.json [--device cuda] [--wide]
           [--model NAME ...] [--provider NAME ...] [--rounds 2]
    pytest conformance/benchmarks/bench_step.py -m bench

A bench file is no test file (`python_files` is `test_*`), so it runs only where it is named, as
above; it never asserts a figure. B01, B02, B05–B07 of the catalogue; B06 is the suite's own: what
importing its plugin and collecting its cases cost. `conformance.benchmarks.publish` makes a report
of the records, which `conformance compare` takes. A cell (model × setting ×
provider) is a fresh process, providers are interleaved over the rounds, and `peer` names the one to
take ratios to: the stock stack, timed in the same run. Memory is what a step or a load adds at its
peak: of the process (resident set) on CPU, of the allocator on a GPU. A tiny model is loaded once
before, for its imports, so its load shows only memory that could not be reused. `--wide` takes a
text model of 100 million parameters instead; the tiny ones show overheads, not throughput.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import batches
from conformance.benchmarks.records import record
from conformance.benchmarks.runner import Records, in_fresh_process
from conformance.case import Case, Check, Model
from conformance.checkpoint import available, checkpoint
from conformance.families import MODELS
from conformance.implementation import load
from conformance.settings import Setting
from conformance.subject import Subject, bound

KERNEL = "step"
PEER = "transformers"
PROVIDERS = ("reference", PEER)
DEFAULT_MODELS = ("gemma4-moe", "gemma4-text", "qwen3_5_moe-text")
SETTINGS = ("-", "lora", "lora-experts")
WARMUPS, REPEATS, LIMIT_S = 3, 10, 180.0
WIDE_TOKENS = 2048
WIDE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 4,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 512,
    "vocab_size": 32768,
    "vocab_size_per_layer_input": 32768,
    "max_position_embeddings": 4096,
}


@dataclass(frozen=True)
class Cell:
    """One measurement, in a process of its own."""

    model: str
    setting: str
    provider: str
    device: str

    @property
    def spec(self) -> Model:
        """The model; `NAME-wide` is NAME with widths at which products count."""
        name, wide, _ = self.model.partition("-wide")
        spec = MODELS[name]
        if not wide:
            return spec
        return replace(spec, name=self.model, tiny={**spec.tiny, **WIDE}, text_vocab=32000)


def peak_rss() -> float:
    """MiB that the process had resident at its peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident() -> float:
    """MiB that the process has resident now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize() / 2**20


def watched(device: str, act: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `act` returns, its seconds, and the MiB that it added at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = resident()
    began = time.perf_counter()
    result = act()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_rss()
    return result, seconds, max(0.0, peak - before)


def batch_of(subject: Subject, plan: Any) -> dict[str, Any]:
    """The batch of a step on the cell's device: the suite's own samples, or long ones if wide."""
    spec = subject.model_spec
    if "-wide" not in spec.name:
        rows: Sequence[Any] = batches.samples(spec, "text", count=4)
    else:
        ids = torch.randint(3, 32000, (WIDE_TOKENS,), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": ids, "labels": ids.clone()}]
    return subject.to(subject.collate(rows, plan), subject.case.setting.dtype)


def measure(cell: Cell) -> Records:
    """Every record of one cell; a first load warms imports up and is not counted."""
    setting = Setting.parse(cell.setting)
    case = Case(Check("B01"), cell.spec, setting)
    path = checkpoint(cell.spec)
    with bound(load(cell.provider), case, cell.device) as subject:
        plan = subject.plan()

        def read() -> Any:
            return subject.impl.build(path, plan).to(cell.device)

        if "-wide" not in cell.model:
            read()
        built, load_s, load_mib = watched(cell.device, read)
        model = subject.adopt(built, plan, adapters=setting.tuning != "full")
        batch = batch_of(subject, plan)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            loss = subject.loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return float(loss.detach())

        seen = [watched(cell.device, step) for _ in range(WARMUPS + REPEATS)]
        launched = launches(cell.device, step)
    first, steady = seen[0], seen[WARMUPS:]
    tokens = int(batch["input_ids"].numel())
    seconds = [s for _, s, _ in steady]
    # the resident set's peak never sinks, so the first step's growth is the step's on CPU
    grown = [mib for _, _, mib in steady] if cell.device == "cuda" else [first[2]]
    rows: list[tuple[str, str, list[float]]] = [
        ("step", "ms", [s * 1e3 for s in seconds]),
        ("tokens_per_s", "tokens/s", [tokens / s for s in seconds]),
        ("step peak", "MiB", grown),
        ("launches", "kernels" if cell.device == "cuda" else "operators", [launched]),
        ("first step", "ms", [first[1] * 1e3]),
        ("load", "ms", [load_s * 1e3]),
        ("load peak", "MiB", [load_mib]),
    ]
    peer = PEER if cell.provider != PEER else ""
    more = {"shape": cell.model, "dtype": setting.dtype, "seed": 0, "peer": peer}
    mode = f"{cell.model}/{cell.setting}"
    return [record(KERNEL, cell.provider, mode, *r, x_value=tokens, **more) for r in rows]


def launches(device: str, step: Callable[[], Any]) -> float:
    """Kernels that a step launches on the GPU; on CPU the operators that it calls."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        step()
    names = [e.name for e in seen.events() if e.device_type == kind]
    return float(sum(device == "cuda" or name.startswith("aten::") for name in names))


def suite_figures(rounds: int = 3) -> Records:
    """What the suite costs before a case runs: the plugin's import over a bare Python's start, and
    one collection of every case."""

    def seconds(*arguments: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    bare = min(seconds("-c", "pass") for _ in range(rounds))
    imports = [1e3 * (seconds("-c", "import conformance.plugin") - bare) for _ in range(rounds)]
    collect = ("-m", "pytest", "--collect-only", "-q", "--pyargs", "conformance.checks")
    rows = [("plugin import", "ms", imports), ("collection", "ms", [1e3 * seconds(*collect)])]
    return [record("suite", "suite", "-", *row, shape="-") for row in rows]


def cells(models: Sequence[str], providers: Sequence[str], device: str, rounds: int) -> list[Cell]:
    """The cells of a run; settings that a model does not have are left out."""
    found = []
    for _ in range(rounds):
        for model in models:
            spec = MODELS[model.partition("-wide")[0]]
            if available(spec):
                continue
            for setting in SETTINGS:
                if Setting.parse(setting).applies_to(spec.traits):
                    found += [Cell(model, setting, p, device) for p in providers]
    return found


def run(chosen: Sequence[Cell]) -> tuple[Records, dict[str, str]]:
    """The records of all cells, and the reasons of those that have none."""
    rows: Records = []
    reasons: dict[str, str] = {}
    for cell in chosen:
        answer = in_fresh_process(measure, cell, LIMIT_S)
        if isinstance(answer, str):
            reasons[f"{cell.model}/{cell.setting}/{cell.provider}"] = answer
        else:
            rows += answer
    return rows, reasons


@pytest.mark.bench
def test_step_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Figures of the first default model, printed; a cell that raises is shown with its reason."""
    rows, reasons = run(cells(DEFAULT_MODELS[:1], PROVIDERS, "cpu", rounds=1))
    with capsys.disabled():
        print(table(rows, reasons))
    assert rows, reasons


def table(rows: Records, reasons: dict[str, str]) -> str:
    """One line a figure."""
    lines = [
        f"{r['mode']:32} {r['provider']:13} {r['metric']:13} {r['median']:11.2f} {r['unit']}"
        for r in rows
    ]
    return "\n".join(["", *lines, *(f"{name}: {reason}" for name, reason in reasons.items())])


def main() -> int:
    """Measure, print, and write the records; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", action="append", choices=sorted(MODELS))
    parser.add_argument("--provider", action="append", choices=PROVIDERS)
    parser.add_argument("--wide", action="store_true", help="gemma4-text, widened, instead")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    models = ["gemma4-text-wide"] if arguments.wide else arguments.model or DEFAULT_MODELS
    chosen = cells(models, arguments.provider or PROVIDERS, arguments.device, arguments.rounds)
    rows, reasons = run(chosen)
    rows += suite_figures()
    print(table(rows, reasons))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=0) + "\n")
    return 0 if rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
