"""Benchmark records as a report and as pictures.

    python -m conformance.benchmarks.publish RECORDS.json ... --report bench.json [--plots FOLDER]
    conformance report bench.json --html page.html

The report has the records of all files (rounds of one cell joined) and a series `floor` beside
them, so that `conformance report` draws time and memory against the floor, and `conformance
compare` takes two of them. `--plots` also writes each figure as SVG and PNG (needs matplotlib).
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from conformance.errors import InputError
from conformance.report import Bench, Report, hardware, load_json, write

KERNEL_METRICS = ("forward+backward", "workspace", "peak", "share of floor")
STEP_METRICS = ("step", "tokens_per_s", "step peak", "launches", "first step", "load", "load peak")
SUITE_METRICS = ("plugin import", "collection")
METRICS = (*KERNEL_METRICS, *STEP_METRICS, *SUITE_METRICS)
PEERS = {"experts+lora": "grouped_mm+split", "linear_cross_entropy": "torch.compile"}


def benches(records: Iterable[dict[str, Any]]) -> list[Bench]:
    """One entry a cell: the median over its rounds; the floor as a provider of its own."""
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in records:
        if row.get("metric") in METRICS:
            shape, mode = row.get("shape") or "-", row["mode"]
            mode = mode if mode.startswith(shape) else f"{shape} {mode}"
            x = str(row["x_value"])
            cells[row["kernel"], row["provider"], mode, row["metric"], x].append(row)
            if "floor_ms" in row:
                floor = dict.fromkeys(("median", "p20", "p80"), row["floor_ms"])
                time = {**row, "unit": "ms", **floor}
                cells[row["kernel"], "floor", mode, "forward+backward", x].append(time)
    return [_joined(*key[:4], rows) for key, rows in sorted(cells.items())]


def _joined(
    kernel: str, provider: str, mode: str, metric: str, rows: Sequence[dict[str, Any]]
) -> Bench:
    first, peer = rows[0], rows[0].get("peer") or PEERS.get(kernel, "")
    return Bench(
        kernel=kernel,
        provider=provider,
        mode=mode,
        metric=metric,
        unit=first["unit"],
        x_name=first["x_name"],
        x_value=float(first["x_value"]),
        median=median(row["median"] for row in rows),
        p20=min(row["p20"] for row in rows),
        p80=max(row["p80"] for row in rows),
        peer="" if provider in (peer, "floor") else peer,
        device=first["device"],
        time=first["time"],
    )


def report_of(records: Sequence[dict[str, Any]]) -> Report:
    """A report without cases: versions and device are those of the first record that has any."""
    found = benches(records)
    measured = next((row for row in records if "versions" in row), {})
    return Report(
        implementation="reference",
        versions=measured.get("versions", {}),
        hardware=hardware(*_device(measured.get("device", "cpu"))),
        started=measured.get("time", ""),
        bench=tuple(found),
    )


def _device(name: str) -> tuple[str, str]:
    """The kind of device and its name, as a report's header has them."""
    return ("cpu", "") if name == "cpu" else ("cuda", name)


def draw(found: Sequence[Bench], folder: Path) -> list[Path]:
    """Each figure of times or memory as SVG and PNG; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str, str], list[Bench]] = defaultdict(list)
    for bench in found:
        groups[bench.kernel, bench.mode, bench.metric].append(bench)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (kernel, mode, metric), rows in groups.items():
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for provider in sorted({row.provider for row in rows}):
            own = sorted((r for r in rows if r.provider == provider), key=lambda r: r.x_value)
            style = "k--" if provider == "floor" else "o-"
            axes.plot([r.x_value for r in own], [r.median for r in own], style, label=provider)
        axes.set(title=f"{kernel} · {mode}", xlabel=rows[0].x_name)
        axes.set_ylabel(f"{metric} ({rows[0].unit})")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
        name = re.sub(r"[^a-z0-9.]+", "-", f"{kernel} {mode} {metric}".lower())
        for ending in ("svg", "png"):
            written.append(folder / f"{name}.{ending}")
            figure.savefig(written[-1], dpi=110)
    return written


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The records of a file. Raises InputError, one line, for what is no list of records."""
    rows = load_json(path)
    needed = {"kernel", "provider", "mode", "metric", "unit", "x_name", "x_value", "median"}
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and needed | {"p20", "p80", "device", "time"} <= row.keys()
        for row in rows
    ):
        raise InputError(f"{path}: no list of benchmark records")
    return rows


def main() -> None:
    """Read the records, write the report and, where asked, the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--plots", type=Path)
    arguments = parser.parse_args()
    try:
        report = report_of([row for path in arguments.records for row in rows_of(path)])
        write(report, arguments.report)
    except InputError as error:
        raise SystemExit(f"publish: {error}") from None
    print(f"{arguments.report}: {len(report.bench)} figures")
    if arguments.plots:
        timed = [b for b in report.bench if b.metric != "share of floor"]
        print(f"{arguments.plots}: {len(draw(timed, arguments.plots))} pictures")


if __name__ == "__main__":
    main()
