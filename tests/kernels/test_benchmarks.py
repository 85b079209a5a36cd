"""`pytest -m bench`: the kernels' figures, never an assertion on one.

On a CPU pytest-benchmark times the plain torch paths at small size. On a GPU the benchmarks' own
runner measures the first cells beside the best peer, prints them and leaves the records in
`bench-KERNEL.json`; the whole list is `python -m conformance.benchmarks.bench_KERNEL`.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.bench
GPU_SECONDS = 120.0


@pytest.fixture
def timer(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip("pytest_benchmark", reason="unavailable: pytest-benchmark is not installed")
    return request.getfixturevalue("benchmark")


def test_experts_on_a_cpu(timer: Any) -> None:
    import torch

    from conformance.benchmarks.bench_experts import Cell, make_inputs
    from conformance.benchmarks.experts_peers import PROVIDERS

    cell = Cell("small", 64, 4, "even", "reference", "cpu")
    x = make_inputs(cell, (8, 128, 64, 2, "silu"))
    layer = PROVIDERS["reference"]()
    grad = torch.ones_like(x.hidden)
    timer(lambda: torch.autograd.grad(layer(x), x.leaves, grad))


@pytest.mark.parametrize("trainable", [False, True])
def test_cross_entropy_on_a_cpu(timer: Any, trainable: bool) -> None:
    import torch

    from impl.kernels.cross_entropy import linear_cross_entropy

    hidden = torch.randn(64, 128, requires_grad=True)
    weight = torch.randn(4096, 128, requires_grad=trainable)
    labels = torch.randint(0, 4096, (64,))
    timer(lambda: linear_cross_entropy(hidden, weight, labels).backward())


@pytest.mark.parametrize("name", ["experts", "cross_entropy"])
def test_on_a_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("unavailable: no GPU")
    module = import_module(f"conformance.benchmarks.bench_{name}")
    from conformance.benchmarks.runner import run_cells

    cells = module.first_cells()
    out = Path(f"bench-{name}.json")
    with capsys.disabled():
        print()
        run_cells(cells, module.measure, module.with_floors, out, GPU_SECONDS, module.KERNEL)
    assert any("metric" in row for row in json.loads(out.read_text()))


def test_published(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="unavailable: matplotlib is not installed")
    from conformance.benchmarks.publish import draw, report_of
    from conformance.page import render

    results = Path(__file__).parents[2] / "conformance/benchmarks/results"
    records = json.loads((results / "experts_h100.json").read_text())
    report = report_of(records)
    assert {"floor", "reference"} <= {bench.provider for bench in report.bench}
    assert "<svg" in render([report])
    assert {path.suffix for path in draw(report.bench[:8], tmp_path)} == {".svg", ".png"}
