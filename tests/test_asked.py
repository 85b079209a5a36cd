"""Mistakes in what a run is asked for: one line, before anything is collected."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance import asked
from tests.test_plugin import X12, run

MARKERS = ["gemma4: model family", "gemma4-e2b: model", "fsdp2: strategy", "xdist_group(name): x"]


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("gemma4", []),
        ("not gemma4-e2b and (fsdp2 or gemma4)", []),
        ("xdist_group(name='any thing')", []),
        ("gemma5", ["'gemma5'; close: gemma4"]),
        ("gemma4 and fsdp3", ["'fsdp3'; close: fsdp2"]),
        ("", []),
    ],
)
def test_unknown_markers(expression: str, wrong: list[str]) -> None:
    found = list(asked._unknown_markers(expression, MARKERS))
    assert len(found) == len(wrong)
    assert all(text in said for text, said in zip(wrong, found, strict=True))


@pytest.mark.parametrize(
    ("glob", "text"),
    [
        ("M05/gemma4-e2b/*", None),
        ("*/single", None),
        ("M0[15]/no-model/*", None),
        ("X05/-/-/-", None),
        ("M05/mixtrl/*", "no model 'mixtrl'; close: mixtral"),
        ("M05/mixtral/lorra/single", "unknown token 'lorra'"),
        ("M05/mixtral/lora/fsdp3", "no strategy 'fsdp3'"),
    ],
)
def test_unknown_parts_of_an_id(glob: str, text: str | None) -> None:
    said = asked._unknown_part(glob)
    assert (said is None) if text is None else (said is not None and text in said)


def test_reports_that_cannot_be_written(tmp_path: Path) -> None:
    assert asked._unwritable(None) is None
    assert asked._unwritable(str(tmp_path / "r.json")) is None
    assert "give a file" in str(asked._unwritable(""))
    assert "give a file" in str(asked._unwritable(str(tmp_path)))
    assert "there is no folder" in str(asked._unwritable(str(tmp_path / "no" / "r.json")))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("conformance/checks", "-m", "gemma5"), "-m 'gemma5': no marker 'gemma5'; close:"),
        (("conformance/checks", "-n", "2", "-m", "gemma5"), "no marker 'gemma5'"),
        (("conformance/checks", "--report", "/nonexistent/r.json"), "there is no folder"),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], text: str) -> None:
    result = run(*arguments)
    assert result.returncode == 4, result.stdout
    output = result.stdout + result.stderr
    assert text in output and "Traceback" not in output
    assert sum(line.startswith("ERROR") for line in output.splitlines()) == 1


def test_a_case_that_is_none_is_said() -> None:
    result = run("conformance/checks/test_detection.py", "--case", "Z99/mixtral/*")
    assert result.returncode == 5
    assert "ERROR: no case matches --case 'Z99/mixtral/*'" in result.stdout


def test_case_takes_cases_alone() -> None:
    result = run("conformance/checks/test_detection.py", "tests/test_curves.py", *X12)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout


def test_a_strangers_own_marker_is_his(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import pytest\n\n@pytest.mark.mine\ndef test_it():\n    pass\n"
    )
    result = run("-p", "conformance.plugin", "-m", "mine", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
