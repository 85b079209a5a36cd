"""The plugin: options, verdicts, strict expectations, and what it costs a stranger's run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import pytest_ignore_collect as ignores

ROOT = Path(__file__).parent.parent
X12 = ("--case", "X12/mixtral/*")


def run(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A pytest run of its own, from a checkout."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def rows(path: Path) -> dict[str, dict[str, Any]]:
    """A report's rows by case id."""
    return {row["case_id"]: row for row in json.loads(path.read_text())["results"]}


def test_stranger_pays_no_torch(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import sys\n\ndef test_it():\n    assert 'torch' not in sys.modules\n"
        "    assert 'conformance.plugin' in sys.modules\n"
    )
    result = run("-p", "conformance.plugin", "-q", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("nobody", "no module 'conformance.implementations.nobody'"),
        ("tests.adapters:MISSING", "has no attribute 'MISSING'"),
        ("tests.adapters:LIAR", "liar claims 'loss' but has no method loss"),
        ("tests.adapters:NOT_ONE", "the adapter has no `name`"),
    ],
)
def test_bad_implementation_is_one_line(spec: str, text: str) -> None:
    result = run("conformance/checks/test_detection.py", "--impl", spec, *X12)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert text in output
    assert "Traceback" not in output


def test_stale_expectation_fails_the_run() -> None:
    result = run("conformance/checks", "--impl", "tests.adapters:STALE", *X12)
    assert result.returncode != 0
    assert "expectations that match no case (remove or mend them): Z99/*" in (
        result.stdout + result.stderr
    )


def test_passing_expectation_fails_the_run(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = run(
        "conformance/checks/test_detection.py",
        "--impl",
        "tests.adapters:HOPEFUL",
        "--report",
        str(path),
        *X12,
    )
    assert result.returncode != 0
    row = rows(path)["X12/mixtral/-/single"]
    assert row["verdict"] == "xpassed"
    assert row["issue"] == "https://example.org/2"


def test_unclaimed_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = run(
        "conformance/checks/test_detection.py",
        "--impl",
        "tests.adapters:PLANNER",
        "--report",
        str(path),
        "--case",
        "*/mixtral/*",
    )
    found = rows(path)
    assert found["X12/mixtral/-/single"]["verdict"] == "passed"
    assert found["X09/mixtral/-/single"]["verdict"] == "unsupported"
    assert "does not claim 'build'" in found["X09/mixtral/-/single"]["reason"]
    failing = found["X10/mixtral/lora/single"]
    assert failing["verdict"] == "error"
    assert "this planner has no plan" in failing["message"]
    assert "--case 'X10/mixtral/lora/single' --impl tests.adapters:PLANNER" in failing["repeat"]
    assert result.returncode != 0


@pytest.mark.parametrize("shard", ["3/2", "a/b"])
def test_bad_shard_is_one_line(shard: str) -> None:
    result = run("conformance/checks/test_detection.py", "--shard", shard, *X12)
    assert result.returncode != 0
    assert f"--shard {shard}" in result.stdout + result.stderr


def test_two_workers_give_the_same_report(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    select = ("conformance/checks", "--case", "A0[123]/mixtral/*")
    for path, extra in ((one, ()), (two, ("-n", "2"))):
        result = run(*select, "--report", str(path), *extra)
        assert path.exists(), result.stdout + result.stderr
    first, second = rows(one), rows(two)
    assert len(first) == 3
    assert set(first) == set(second)
    for case_id, row in first.items():
        assert row["verdict"] == second[case_id]["verdict"], case_id
        assert row["measured"] == second[case_id]["measured"], case_id


def test_loadgroup_keeps_a_group_on_one_worker(tmp_path: Path) -> None:
    """pytest 9.2.0 with xdist 3.8.0 spreads a group over the workers; the pin is for this."""
    (tmp_path / "test_groups.py").write_text(
        "import os, pytest\n\n"
        "@pytest.mark.parametrize('i', range(12))\n"
        "@pytest.mark.xdist_group('one')\n"
        "def test_it(i, worker_id):\n"
        "    with open(os.environ['WORKERS'], 'a') as file: file.write(worker_id + '\\n')\n"
    )
    os.environ["WORKERS"] = str(tmp_path / "workers")
    result = run("-q", "-n", "2", "--dist", "loadgroup", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    workers = (tmp_path / "workers").read_text().split()
    assert len(workers) == 12
    assert len(set(workers)) == 1


@pytest.mark.parametrize(
    ("expression", "imported"),
    [
        ("gemma4", False),
        ("gemma4 and not ranks", False),
        ("gemma4 or ranks", True),
        ("not ranks", True),
        ("not gemma4", True),
        ("", True),
        ("gemma4 and", True),
    ],
)
def test_own_tests_are_imported_where_they_can_be_selected(
    expression: str, imported: bool, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytestconfig.option, "markexpr", expression)
    ignored = ignores(Path(__file__), pytestconfig)
    assert ignored is (None if imported else True)
