"""Benchmark records become a report, which `conformance compare` takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.benchmarks import bench_step, publish
from conformance.cli import run
from conformance.compare import compare
from conformance.errors import InputError
from conformance.report import Report


def rows(step_ms: float, peak: float = 10.0, provider: str = "reference") -> list[dict[str, Any]]:
    """Records as `bench_step` writes them: a cell and its peer of the same run."""

    def one(name: str, metric: str, unit: str, value: float) -> dict[str, Any]:
        return {
            "kernel": "step", "provider": name, "mode": "gemma4-text/lora", "metric": metric,
            "unit": unit, "x_name": "tokens", "x_value": 52, "median": value, "p20": value,
            "p80": value, "shape": "gemma4-text", "device": "cpu", "time": "t", "seed": 0,
            "peer": "transformers" if name != "transformers" else "", "versions": {"torch": "2"},
        }  # fmt: skip

    return [
        one(provider, "step", "ms", step_ms),
        one("transformers", "step", "ms", 20.0),
        one(provider, "step peak", "MiB", peak),
        one("transformers", "step peak", "MiB", 10.0),
        one(provider, "tokens_per_s", "tokens/s", 52e3 / step_ms),
        one("transformers", "tokens_per_s", "tokens/s", 2600.0),
    ]


def speed(before: Report, after: Report) -> list[str]:
    return [f"{c.case_id}: {c.text}" for c in compare(before, after).sections["speed"]]


def test_a_slower_step_is_a_worse_ratio_to_the_peer_of_its_run() -> None:
    old, new = publish.report_of(rows(20.0)), publish.report_of(rows(30.0))
    assert speed(old, new) == [
        "step · reference · gemma4-text/lora: step as a ratio to transformers 1 → 1.5 at tokens 52",
        "step · reference · gemma4-text/lora: tokens_per_s as a ratio to transformers 1 → 0.667 at"
        " tokens 52",
    ]
    assert speed(new, old) == []


def test_memory_may_grow_less_than_time() -> None:
    old = publish.report_of(rows(20.0, 10.0))
    assert speed(old, publish.report_of(rows(20.0, 10.3))) == []
    assert len(speed(old, publish.report_of(rows(21.5, 10.7)))) == 1
    assert old.hardware["device"] == "cpu" and old.versions == {"torch": "2"}


def test_rounds_of_a_cell_are_joined() -> None:
    joined = publish.report_of([*rows(20.0), *rows(40.0)])
    steps = [b for b in joined.bench if b.metric == "step" and b.provider == "reference"]
    assert [(b.median, b.p20, b.p80) for b in steps] == [(30.0, 20.0, 40.0)]
    assert replace(joined, bench=()).bench == ()


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"kernel": "x"}]', "no JSON"])
def test_what_is_no_list_of_records_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        publish.rows_of(path)
    assert "\n" not in str(error.value)


def test_two_benches_compare_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("a", 20.0), ("b", 40.0)):
        (tmp_path / f"{name}-rows.json").write_text(json.dumps(rows(value)))
        report = tmp_path / f"{name}.json"
        options = ["publish", str(tmp_path / f"{name}-rows.json"), "--report", str(report)]
        monkeypatch.setattr("sys.argv", options)
        publish.main()
    assert run(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "as a ratio to transformers 1 → 2" in capsys.readouterr().out


def test_every_figure_of_a_step_and_of_the_suite_reaches_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_step.subprocess, "run", lambda *_, **__: None)
    names = {row["metric"] for row in bench_step.suite_figures(rounds=1)}
    assert names == set(publish.SUITE_METRICS)
    source = Path(bench_step.__file__).read_text()
    assert all(f'("{name}",' in source for name in publish.STEP_METRICS)
