"""What a comparison says of two runs, on small reports whose difference is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.annotations import read_annotations
from conformance.compare import SECTIONS, Comparison, compare
from conformance.compare_output import FORMATS
from conformance.errors import InputError
from conformance.report import Bench, Report, Row

OLD = {"transformers": "5.17.0", "python": "3.11.7"}
NEW = {"transformers": "5.23.0", "python": "3.11.7"}
HARDWARE = {"device": "cpu", "name": "a CPU", "cpu_count": 2, "platform": "linux-x86_64"}


def report(
    verdicts: Mapping[str, str], versions: Mapping[str, str] = NEW, **rest: object
) -> Report:
    rows = tuple(Row(f"{name}/m/-/single", verdict) for name, verdict in verdicts.items())
    base = Report("transformers", rows, versions=versions, hardware=HARDWARE)
    return replace(base, **rest)  # type: ignore[arg-type]


def sections(found: Comparison) -> dict[str, list[str]]:
    return {
        name: [change.case_id.split("/")[0] for change in changes]
        for name, changes in found.sections.items()
        if changes
    }


def both(old: str, new: str) -> dict[str, list[str]]:
    """The sections when a case goes from one verdict to another beside one that passes."""
    before = report({"A01": old, "Z99": "passed"}, OLD)
    return sections(compare(before, report({"A01": new, "Z99": "passed"})))


@pytest.mark.parametrize(
    ("old", "new", "section"),
    [
        ("passed", "failed", "broken"),
        ("passed", "error", "broken"),
        ("passed", "timeout", "broken"),
        ("passed", "xfailed", "broken"),
        ("xpassed", "failed", "broken"),
        ("failed", "passed", "fixed"),
        ("xfailed", "passed", "fixed"),
        ("xfailed", "xpassed", "fixed"),
        ("passed", "unsupported", "skipped"),
        ("failed", "unavailable", "skipped"),
        ("unsupported", "failed", "uncovered"),
        ("unavailable", "passed", "covered"),
        ("xfailed", "failed", "still"),
        ("failed", "xfailed", "still"),
        ("passed", "passed", None),
        ("unsupported", "unavailable", None),
    ],
)
def test_each_pair_of_verdicts_has_its_section(old: str, new: str, section: str | None) -> None:
    assert both(old, new) == ({section: ["A01"]} if section else {})


def test_the_exit_status_is_one_only_when_something_broke() -> None:
    before = report({"A01": "passed", "B01": "failed"}, OLD)
    assert compare(before, report({"A01": "failed", "B01": "failed"})).exit == 1
    assert compare(before, report({"A01": "unsupported", "B01": "failed"})).exit == 0
    assert compare(before, report({"B01": "passed"})).exit == 0


def test_the_verdict_line_names_what_moved() -> None:
    found = compare(report({"A01": "passed"}, OLD), report({"A01": "failed"}))
    assert found.verdict == "BROKEN: transformers 5.17.0 → 5.23.0: 1 broken (1 cases)"


def test_checks_of_another_suite_version_are_new_or_retired_never_fixed_or_gone() -> None:
    before = report({"A01": "passed", "B01": "passed"}, OLD, suite_version="1")
    after = report({"A01": "passed", "C01": "failed"}, suite_version="2")
    found = compare(before, after)
    assert sections(found) == {"new": ["C01"], "retired": ["B01"]}
    assert found.exit == 0 and "different suites: 1 → 2" in found.notes
    same = compare(replace(before, suite_version="2"), after)
    assert sections(same) == {"gone": ["B01"], "uncovered": ["C01"]}


def test_different_machines_and_implementations_are_said() -> None:
    before = report({"A01": "passed"}, OLD)
    gpu = {**HARDWARE, "device": "cuda", "name": "a GPU"}
    after = report({"A01": "passed"}, implementation="trl", hardware=gpu)
    notes = compare(before, after).notes
    assert notes == (
        "different implementations: transformers → trl",
        "different devices: cpu → cuda",
        "different machines: a CPU linux-x86_64 → a GPU linux-x86_64",
    )


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (report({}), "the second report has no case"),
        (report({"A01": "passed"}, selection="-m gemma4"), "the selection differs"),
        (report({"A01": "passed"}, matrix="full"), "the matrix differs"),
        (report({"Q01": "passed"}), "no case in common"),
    ],
)
def test_incomparable_reports_are_refused_with_one_line(after: Report, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        compare(report({"A01": "passed"}, OLD), after)
    assert "\n" not in str(error.value)


def test_cases_of_a_module_that_no_longer_imports_are_broken_not_gone() -> None:
    before = report({"A01": "passed", "B01": "passed", "C01": "failed"}, OLD)
    after = report({"A01": "passed"}, uncollected=("test_b.py: ImportError: cache",))
    found = compare(before, after)
    assert sections(found) == {"broken": ["B01"], "gone": ["C01"]} and found.exit == 1
    assert "the second run could not import test_b.py: ImportError: cache" in found.notes
    assert "not collected" in found.sections["broken"][0].text


def measured(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Texts of the drift and speed sections when a passing case's numbers move."""
    row = Row("A01/m/-/single", "passed", measured=before)
    old = replace(report({}, OLD), rows=(row,))
    found = compare(old, replace(report({}), rows=(replace(row, measured=after),)))
    return [c.text for name in ("drift", "speed") for c in found.sections[name]]


def test_an_error_that_grew_while_passing_is_drift() -> None:
    assert measured({"max_abs": 1e-8}, {"max_abs": 2e-6}) == ["max_abs 1e-08 → 2e-06"]
    assert measured({"max_abs": 1e-8}, {"max_abs": 2e-8}) == []
    assert measured({"max_abs": 1e-16}, {"max_abs": 1e-14}) == []
    assert measured({"e": 1e-8, "tolerance": 1e-3}, {"e": 1e-6, "tolerance": 1e-3}) == []
    assert measured({"e": 1e-8, "tolerance": 1e-6}, {"e": 9e-7, "tolerance": 1e-6}) != []
    assert measured({"e": 1e-8}, {"e": float("nan")}) == ["e 1e-08 → nan"]


def test_a_fingerprint_that_moved_is_drift_however_little() -> None:
    assert measured({"fingerprint.loss": 4.5}, {"fingerprint.loss": 4.5 * (1 + 1e-7)}) != []
    assert measured({"fingerprint.loss": 4.5}, {"fingerprint.loss": 4.5 * (1 + 1e-10)}) == []


def test_memory_and_seconds_that_grew_are_told() -> None:
    assert measured({"peak_mib": 100.0}, {"peak_mib": 120.0}) == ["peak_mib 100 → 120"]
    assert measured({"peak_mib": 100.0}, {"peak_mib": 101.0}) == []
    assert measured({"load_s": 1.0}, {"load_s": 2.0}) == ["load_s 1.00 → 2.00"]


def bench(provider: str, median: float, metric: str = "time") -> Bench:
    return Bench(
        "experts", provider, "forward", metric, "ms", "tokens", 8.0, median, median * 0.99,
        median * 1.01, peer="grouped_mm",
    )  # fmt: skip


def test_benchmarks_compare_as_ratios_to_a_peer_of_their_own_run() -> None:
    old = report({}, OLD, bench=(bench("reference", 1.0), bench("grouped_mm", 2.0)))
    slower_machine = report({}, bench=(bench("reference", 2.0), bench("grouped_mm", 4.0)))
    assert sections(compare(old, slower_machine)) == {}
    worse = report({}, bench=(bench("reference", 1.5), bench("grouped_mm", 2.0)))
    text = compare(old, worse).sections["speed"][0].text
    assert text == "time as a ratio to grouped_mm 0.5 → 0.75 at tokens 8"


def test_announced_changes_stand_apart_and_break_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        '[[change]]\npackage = "transformers"\nsince = "5.20.0"\ncases = ["A0*"]\n'
        'kinds = ["broken"]\nwhat = "masks changed"\nthread = "https://example.org/1"\n'
    )
    before, after = report({"A01": "passed"}, OLD), report({"A01": "failed"})
    found = compare(before, after, read_annotations(path))
    assert found.exit == 0 and sections(found) == {"expected": ["A01"]}
    earlier = replace(after, versions={**NEW, "transformers": "5.19.0"})
    assert compare(before, earlier, read_annotations(path)).exit == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[change]]\n", "'package' is missing"),
        ("change = 1", "change: number"),
        ("[", "not TOML"),
        (
            '[[change]]\npackage="a"\nsince="x y"\ncases=["*"]\nkinds=["drift"]\nwhat="w"\n'
            'thread="t"',
            "Invalid version",
        ),
    ],
)
def test_bad_annotations_are_refused_with_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_annotations(path)
    assert "\n" not in str(error.value)


def test_the_shipped_annotations_are_well_formed() -> None:
    assert all(entry.thread.startswith("https://") for entry in read_annotations())


HOSTILE = "<img src=x onerror=alert(1)> `x` [a](javascript:b) @you | $(rm -rf ~)\x1b]0;t\x07"


@pytest.mark.parametrize("form", FORMATS)
def test_hostile_strings_reach_no_markup(form: str) -> None:
    rows = (Row("A01/m/-/single", "passed"), Row("B01/m/-/single", "failed", HOSTILE, HOSTILE))
    bad = tuple(replace(row, verdict="failed", message=HOSTILE, repeat=HOSTILE) for row in rows)
    old = replace(report({}, {**OLD, "peft": HOSTILE}), rows=rows, implementation=HOSTILE)
    found = compare(old, replace(old, rows=bad, versions=NEW, checks={"A01": (HOSTILE, HOSTILE)}))
    text = FORMATS[form](found)
    assert "\x1b" not in text
    if form in ("html", "markdown"):
        assert "<img" not in text and 'href="javascript' not in text
    if form == "markdown":
        assert "](javascript" not in text
    if form == "json":
        assert json.loads(text)["exit"] == 1
    assert set(found.sections) == set(SECTIONS)


def test_schema_snapshots_differ_in_words() -> None:
    from conformance.schema_snapshot import differences

    old = {"models": {"m": {"forward": ["a", "b"], "config": {"x": 1}}, "n": {"unavailable": "no"}}}
    new = {"models": {"m": {"forward": ["a", "c"], "config": {"y": 2}}, "n": {"forward": []}}}
    assert differences(old, new) == [
        "m: config: x removed (1)",
        "m: config: y added (2)",
        "m: forward: - b, + c",
        "n: model now available",
    ]
    many = {"models": {"m": {"disk": {f"a.b.{i}": 1 for i in range(9)}}}}
    none: dict[str, dict[str, dict[str, dict[str, int]]]] = {"models": {"m": {"disk": {}}}}
    assert differences(none, many) == ["m: disk: 9 names under a.b added (such as a.b.0)"]


def test_every_committed_snapshot_can_be_read_and_compared() -> None:
    from conformance.schema_snapshot import committed_difference, read_snapshot, schema_folder

    paths = sorted(schema_folder().glob("transformers-*.json"))
    assert len(paths) >= 5
    assert all(read_snapshot(path)["versions"]["transformers"] in path.name for path in paths)
    old, new = report({}, OLD), report({}, NEW)
    assert committed_difference(old, new) == []
    unknown = replace(new, versions={**NEW, "transformers": "5.99.0"})
    (line,) = committed_difference(old, unknown)
    assert "no snapshot of transformers 5.99.0" in line
    asked = (Row("A01/gemma4-moe/-/single", "passed"),)
    lines = committed_difference(replace(old, rows=asked), replace(new, rows=asked))
    assert lines and all("\n" not in line for line in lines)
