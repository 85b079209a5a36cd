"""The nightly shards cover the matrix exactly, and the workflows are what they should be."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from conformance.families import MODELS
from conformance.strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ENVIRONMENTS = ["lint", "min", "stable", "tf-next", "peft-next", "next", "mutants", "bench", "gpu"]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / "ci" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MATRIX = script("matrix")


def test_every_case_lies_in_one_shard() -> None:
    assert MATRIX.faults("default") == []
    assert MATRIX.faults("full") == []


def test_a_missing_shard_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = [s for s in MATRIX.shards() if s["name"] != "mixtral-single"]
    monkeypatch.setattr(MATRIX, "shards", lambda: fewer)
    assert any("/mixtral/" in fault for fault in MATRIX.faults("default"))


def test_a_shard_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = MATRIX.shards() + [s for s in MATRIX.shards() if s["name"] == "mixtral-single"]
    monkeypatch.setattr(MATRIX, "shards", lambda: twice)
    assert any("2 shards" in fault for fault in MATRIX.faults("default"))


def test_shards_are_the_product() -> None:
    found = {(s["family"], s["strategy"]) for s in MATRIX.shards()} - {("-", "-")}
    assert found == {
        (model.family, strategy.name)
        for model in MODELS.values()
        for strategy in STRATEGIES.values()
        if strategy.applies_to(model.traits)
    }


def test_matrix_is_json_for_a_workflow() -> None:
    out = subprocess.check_output([sys.executable, ROOT / "ci" / "matrix.py", "--runner=gpu"])
    include = json.loads(out)["include"]
    assert 0 < len(include) <= 256, "a workflow takes at most 256 jobs of a matrix"
    assert {entry["gpus"] for entry in include} == {1, 2, 4}
    words = [word for entry in include for word in entry["options"].split()]
    assert all(re.fullmatch(r"--case=[\w*/.-]+", word) for word in words)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_is_well_formed(path: Path) -> None:
    data = yaml.safe_load(path.read_text())
    assert data["name"] and data[True] and data["permissions"] == {"contents": "read"}
    for name, job in data["jobs"].items():
        assert "uses" in job or job["timeout-minutes"], f"{path.name}: {name} has no limit"
        for needed in (
            [job.get("needs", [])] if isinstance(job.get("needs"), str) else job.get("needs", [])
        ):
            assert needed in data["jobs"]
        for step in job.get("steps", []):
            assert ("run" in step) != ("uses" in step)
            unsafe = re.findall(r"\$\{\{\s*(?:inputs|github\.event)[^}]*\}\}", step.get("run", ""))
            assert not unsafe, f"{path.name}: {name}: pasted into a shell: {unsafe}"


def test_there_are_three_workflows() -> None:
    assert [path.stem for path in WORKFLOWS] == ["ci", "conformance", "nightly"]
    reusable = yaml.safe_load(WORKFLOWS[1].read_text())
    assert reusable[True]["workflow_call"]["inputs"]["impl"]["required"] is True


def test_tox_has_its_environments() -> None:
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    assert {s.removeprefix("testenv:") for s in tox if ":" in s} == set(ENVIRONMENTS)
    for name in ("min", "stable", "tf-next", "peft-next", "next", "gpu"):
        commands = tox[f"testenv:{name}"].get("commands") or tox["testenv"]["commands"]
        assert "against_stable.py" in commands or commands == "{[testenv]commands}"


def small(verdicts: dict[str, str], **rest: Any) -> Any:
    """A report of a few cases."""
    from conformance.report import Report, Row, hardware, now, versions

    rows = tuple(Row(f"{name}/a/-/single", verdict) for name, verdict in verdicts.items())
    facts = {"versions": versions(), "hardware": hardware(), "started": now(), **rest}
    return Report(**{"implementation": "reference", "rows": rows, **facts})


@pytest.fixture
def against(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`against_stable` with a stable report of three passing cases."""
    from conformance.report import write

    module = script("against_stable")
    stable = tmp_path / "stable.json"
    write(small({"M01": "passed", "M02": "passed", "M03": "passed"}), stable)
    monkeypatch.setattr(module, "STABLE", stable)
    return module


@pytest.mark.parametrize("absent", ["no stable report", "of another implementation"])
def test_without_a_stable_report_the_run_decides(
    absent: str, against: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "reference"
    if absent == "no stable report":
        monkeypatch.setattr(against, "STABLE", tmp_path / "none.json")
    else:
        name = "transformers"
    assert against.against(small({"M01": "passed"}, implementation=name))[1] == 0
    text, status = against.against(small({"M01": "failed"}, implementation=name))
    assert status == 1 and "failed: M01/a/-/single" in text


def test_a_narrowed_run_does_not_call_the_rest_gone(against: Any) -> None:
    text, status = against.against(small({"M01": "passed"}, selection="-m 'smoke'"))
    assert status == 0 and "gone" not in text and "1 of its 3 cases" in text
    text, status = against.against(small({"M01": "failed"}, selection="-m 'smoke'"))
    assert status == 1 and "1 broken" in text


def test_a_whole_run_that_lost_cases_says_so(against: Any) -> None:
    found = small({"M01": "passed"})
    text, status = against.against(found)
    assert status == 0 and "2 gone" in text
    text, status = against.against(replace(found, uncollected=("test_x.py: ImportError",)))
    assert status == 1 and "2 broken" in text and "test_x.py: ImportError" in text


def test_what_cannot_be_compared_is_one_line_and_status_two(
    against: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    path.write_text("no report")
    assert against.main([str(path)]) == 2
    assert against.main([]) == 2
    assert all(line for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("uv", ["/bin/uv", None])
def test_the_newest_of_one_package_moves_nothing_else(
    uv: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = script("newest")
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "1.0", "")

    monkeypatch.setattr(newest.shutil, "which", lambda name: uv)
    monkeypatch.setattr(newest.subprocess, "run", run)
    assert newest.main(["peft"]) == 0
    if uv:
        assert commands[0][-3:] == ["--upgrade-package", "peft", "peft"]
        assert "--upgrade" not in commands[0]
    else:
        assert commands[0][-2:] == ["--upgrade", "peft"]
    assert newest.main(["peft; true"]) == 2


def test_shards_are_joined(tmp_path: Path) -> None:
    from conformance.errors import InputError
    from conformance.report import Report, Row, hardware, now, read, versions, write

    join = script("join_reports")

    def report(case_id: str, verdict: str, implementation: str = "reference") -> Report:
        return Report(
            implementation=implementation,
            rows=(Row(case_id, verdict),),
            versions=versions(),
            hardware=hardware(),
            matrix="full",
            started=now(),
            selection="",
            wall_s=2.0,
            exit=int(verdict != "passed"),
            checks={},
        )

    one, two = report("M01/a/-/single", "passed"), report("M01/b/-/single", "failed")
    whole = join.joined([two, one])
    write(whole, tmp_path / "all.json")
    again = read(tmp_path / "all.json")
    assert [row.case_id for row in again.rows] == ["M01/a/-/single", "M01/b/-/single"]
    assert (again.wall_s, again.exit) == (4.0, 1)
    with pytest.raises(InputError, match="two shards"):
        join.joined([one, one])
    with pytest.raises(InputError, match="implementation"):
        join.joined([one, report("M01/c/-/single", "passed", "other")])
