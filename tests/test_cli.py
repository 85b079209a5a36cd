"""The command line: what works, and one line with status 2 for what cannot."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conformance import cli
from conformance.new_adapter import TEMPLATE
from conformance.report import write
from tests.synthetic import report

SMALL = replace(report("transformers"), rows=report("transformers").rows[:60])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two reports of which the second is worse."""
    bad = replace(SMALL.rows[5], verdict="failed", message="wrong")
    write(SMALL, tmp_path / "a.json")
    write(replace(SMALL, rows=(*SMALL.rows[:5], bad, *SMALL.rows[6:])), tmp_path / "b.json")
    return tmp_path / "a.json", tmp_path / "b.json"


def test_report_shows_the_matrix(files: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["report", str(files[1])]) == 0
    out = capsys.readouterr().out
    assert SMALL.rows[5].model in out and "failed 1" in out and "wrong" in out


def test_report_writes_a_page_and_markdown(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "page.html"
    assert cli.run(["report", *map(str, files), "--html", str(page), "--markdown"]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert capsys.readouterr().out.startswith("## Conformance")


@pytest.mark.parametrize("form", ["text", "markdown", "json", "html"])
def test_compare_exits_one_iff_broken(
    form: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    a, b = map(str, files)
    assert cli.run(["compare", a, b, "--format", form]) == 1
    out = capsys.readouterr().out
    if form == "json":
        assert json.loads(out)["exit"] == 1
    assert cli.run(["compare", a, a, "--format", form]) == 0
    assert cli.run(["compare", b, a, "--format", form]) == 0


PINS = ["upgrade", "--from", "transformers==5.17.0", "--to", "transformers==5.23.0"]
BAD: dict[str, list[str]] = {
    "no such command": ["judge"],
    "no such report": ["report", "/nonexistent/r.json"],
    "no arguments": ["compare"],
    "no such format": ["compare", "a", "b", "--format", "pdf"],
    "not a pin": ["upgrade", "--from", "transformers>=5", "--to", "transformers==5.23.0"],
    "not a name": ["upgrade", "--from", "!!==1", "--to", "transformers==5.23.0"],
    "no such matrix": [*PINS, "--matrix", "all"],
    "no marker expression": [*PINS, "-m", "a b"],
    "no pins": ["upgrade", "--from", "", "--to", "transformers==5.23.0"],
    "no case id": ["reproduce", "M05"],
    "unknown model": ["reproduce", "M05/gemma9/-/single"],
    "unknown setting": ["reproduce", "M05/mixtral/lorra/single"],
    "hostile id": ["reproduce", "M05';rm -rf ~;'/mixtral/-/single"],
    "too many ranks": ["reproduce", "M05/mixtral/-/hsdp"],
    "no module name": ["new-adapter", "my-stack.py"],
    "no such folder": ["new-adapter", "/nonexistent/mine.py"],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_two(name: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.run(BAD[name]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("conformance: ") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(request: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("conformance.upgrade_progress.judge", interrupted)
    assert cli.run(PINS) == 130
    assert capsys.readouterr().err == "conformance: interrupted; the same command continues\n"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from conformance.cli import run; status = run(['--help']);"
        " assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for command in ("report", "compare", "upgrade", "reproduce", "plan", "new-adapter"):
        assert command in result.stdout


def test_new_adapter_writes_a_module_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "my_stack.py"
    assert cli.run(["new-adapter", str(path)]) == 0
    monkeypatch.syspath_prepend(tmp_path)
    from conformance.implementation import load

    assert list(load("my_stack:IMPLEMENTATION").capabilities) == ["fit"]
    assert cli.run(["new-adapter", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_skeleton_is_short_and_typed() -> None:
    text = TEMPLATE.format(module="m")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    assert all(f.returns and all(a.annotation for a in f.args.args[1:]) for f in functions)
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 40


@pytest.mark.parametrize(
    "case_id",
    [
        "L02/gemma4-e2b/lora+ckpt-nonreentrant/single",
        "S01/mixtral/packed/single",
        "V03/gemma3-vlm/images/single",
        "R02/qwen3_moe/lora-experts+accum/fsdp2",
        "D01/gemma4-moe/bf16+ckpt-reentrant/ddp",
    ],
)
def test_reproduce_writes_python_that_knows_nothing_of_the_suite(case_id: str) -> None:
    from conformance.reproduce import script

    tree = ast.parse(script(case_id))
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imported - set(sys.stdlib_module_names) <= {"torch", "transformers", "peft"}
