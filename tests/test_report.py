"""report.json: what is written is read back, and what is malformed is refused in one line."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from conformance.json_schema import violation
from conformance.report import (
    Bench,
    Report,
    ReportError,
    Row,
    from_json,
    merge_rows,
    one_line,
    read,
    schema,
    to_json,
    versions,
    write,
)

SMALL = Report(
    "reference",
    (
        Row("M05/gemma4-moe/lora+packed/ddp", "passed", measured={"max_abs": 1.5e-16}),
        Row("L02/mixtral/-/single", "xfailed", "a known one", "https://example.org/1", "L02/*"),
        Row("X01/-/-/-", "failed", message="two\nlines \x1b[31m red", where="test_x.py:3"),
    ),
    versions=versions(),
    hardware={"device": "cpu", "name": "a CPU", "cpu_count": 2, "platform": "linux-x86_64"},
    started="2026-11-24T12:00:00Z",
    wall_s=1.5,
    exit=1,
    bench=(Bench("experts", "reference", "forward", "time", "ms", "tokens", 8.0, 1.0, 0.9, 1.1),),
    checks={"M05": ("a claim", "https://example.org/2")},
    uncollected=("test_x.py: ImportError: gone",),
)


def test_read_gives_back_what_was_written(tmp_path: Path) -> None:
    write(SMALL, tmp_path / "r.json")
    found = read(tmp_path / "r.json")
    assert found == replace(SMALL, rows=tuple(sorted(SMALL.rows, key=lambda row: row.case_id)))


def test_writing_is_deterministic_whatever_the_order(tmp_path: Path) -> None:
    write(SMALL, tmp_path / "a.json")
    write(replace(SMALL, rows=SMALL.rows[::-1]), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_numbers_that_json_lacks_survive(tmp_path: Path) -> None:
    odd = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 5e-324}
    write(Report("x", (Row("A01/m/-/single", "passed", measured=odd),)), tmp_path / "r.json")
    found = read(tmp_path / "r.json").rows[0].measured
    assert math.isnan(found["a"]) and found["b"] == math.inf and found["c"] == -math.inf
    assert found["d"] == 5e-324


def test_messages_are_one_line_without_control_characters() -> None:
    assert SMALL.rows[2].message == "two lines [31m red"
    assert len(one_line("x" * 1000)) == 500


def test_a_written_report_obeys_the_published_schema() -> None:
    Draft202012Validator.check_schema(schema())
    assert list(Draft202012Validator(schema()).iter_errors(to_json(SMALL))) == []


def test_unwritable_places_and_double_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be written"):
        write(SMALL, tmp_path / "missing" / "r.json")
    twice = replace(SMALL, rows=(SMALL.rows[0], SMALL.rows[0]))
    with pytest.raises(ReportError, match="M05/gemma4-moe/lora\\+packed/ddp twice"):
        write(twice, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def changed(*path: Any, to: Any = None, drop: bool = False) -> dict[str, Any]:
    """The small report as JSON with one place changed or dropped."""
    data = json.loads(json.dumps(to_json(SMALL)))
    place = data
    for key in path[:-1]:
        place = place[key]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return data


BAD = {
    "missing footer": (changed("footer", drop=True), "'footer' is missing"),
    "unknown verdict": (changed("results", 0, "verdict", to="skipped"), "results[0].verdict"),
    "unknown key": (changed("results", 0, "nodeid", to="x"), "unknown key 'nodeid'"),
    "a NaN in words": (changed("results", 0, "duration", to="nan"), "results[0].duration"),
    "negative": (changed("results", 0, "duration", to=-1.0), "below 0"),
    "inconsistent": (changed("results", 0, "model", to="gemma"), "inconsistent with its parts"),
    "bad id": (changed("results", 0, "case_id", to="a/b"), "does not have the form"),
    "id with a line break": (changed("results", 0, "case_id", to="a/b/c/d\n"), "the form"),
    "wrong count": (changed("footer", "counts", to={"passed": 3}), "footer.counts"),
    "other schema": (changed("header", "schema", to=2), "header.schema"),
    "true for one": (changed("header", "schema", to=True), "header.schema"),
    "half a surrogate": (changed("results", 0, "reason", to="\ud800"), "surrogate"),
    "too large a number": (changed("results", 0, "measured", to={"x": 10**400}), "float"),
    "a list": ([], "top level"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_reports_are_refused_with_the_place(name: str) -> None:
    data, expected = BAD[name]
    with pytest.raises(ReportError) as error:
        from_json(data, "r.json")
    assert expected in str(error.value) and str(error.value).startswith("r.json: ")
    assert "\n" not in str(error.value)


TEXTS = {
    "not JSON": ("{", ":1: not JSON"),
    "NaN": ('{"a": NaN}', "no JSON number"),
    "twice": ('{"a": 1, "a": 2}', "key 'a' twice"),
    "deep": ("[" * 100_000, "too deeply"),
    "many digits": ("1" * 10_000, "digits"),
    "empty": ("", "not JSON"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_no_reports_are_refused(name: str, tmp_path: Path) -> None:
    text, expected = TEXTS[name]
    path = tmp_path / "r.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ReportError) as error:
        read(path)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        read(tmp_path / "none.json")
    (tmp_path / "r.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ReportError, match="not UTF-8"):
        read(tmp_path / "r.json")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [path] if path else []
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
DATA = json.loads(json.dumps(to_json(SMALL)))


@given(place=st.sampled_from(places(DATA)), value=JSON, how=st.sampled_from(["set", "drop", "add"]))
def test_mutated_reports_are_accepted_or_refused_with_one_line(
    place: tuple[Any, ...], value: Any, how: str
) -> None:
    data = copy.deepcopy(DATA)
    parent = data
    for key in place[:-1]:
        parent = parent[key]
    if how == "set":
        parent[place[-1]] = value
    elif how == "drop":
        del parent[place[-1]]
    elif isinstance(parent, list):
        parent.append(value)
    else:
        parent["new"] = value
    ours = violation(data, schema())
    theirs = next(Draft202012Validator(schema()).iter_errors(data), None)
    assert (ours is None) == (theirs is None), (ours, theirs)
    try:
        found = from_json(data)
    except ReportError as error:
        assert "\n" not in str(error) and str(error).isprintable()
    else:
        assert from_json(to_json(found)) == found or "nan" in json.dumps(to_json(found))


def test_shards_merge_into_one_run() -> None:
    a, b = SMALL.rows[:1], (replace(SMALL.rows[0], verdict="failed"), SMALL.rows[2])
    merged = merge_rows([a, b])
    assert [row.verdict for row in merged] == ["failed", "failed"]
    assert [row.case_id[:3] for row in merged] == ["M05", "X01"]


def test_records_import_no_torch() -> None:
    import subprocess

    modules = "report compare page markdown terminal cli environments suite_run attribution"
    code = "; ".join(f"import conformance.{name}" for name in modules.split())
    code += "; import sys; assert 'torch' not in sys.modules"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
