"""The nightly shards cover the matrix exactly, and the workflows are what they should be."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import subprocess
import sys
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


def test_without_a_stable_report_the_run_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    against = script("against_stable")
    monkeypatch.setattr(against, "STABLE", tmp_path / "none.json")
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"results": [{"case_id": "M01/a/-/single", "verdict": "passed"}]}))
    assert against.main([str(report)]) == 0
    report.write_text(json.dumps({"results": [{"case_id": "M01/a/-/single", "verdict": "failed"}]}))
    assert against.main([str(report)]) == 1
    assert "M01/a/-/single" in capsys.readouterr().out
    report.write_text("no report")
    assert against.main([str(report)]) == 2


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
