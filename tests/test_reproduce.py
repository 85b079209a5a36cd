"""Scripts for upstream issues: they know nothing of the suite, and show what the check sees."""

from __future__ import annotations

import ast
import contextlib
import runpy
import sys
from pathlib import Path

import pytest

from conformance.catalogue import checks
from conformance.errors import InputError
from conformance.expectation import expected
from conformance.implementations.transformers_expectations import EXPECTATIONS
from conformance.matrix import cases
from conformance.reproduce import BY_SETTING, OUTSIDE, QUESTIONS, STRATEGIES, script

PACKAGES = {"torch", "transformers", "peft", "accelerate"}


def one_case_of_each_check() -> list[str]:
    """The first case of every check and strategy that a script can be asked for."""
    found: dict[tuple[str, str], str] = {}
    for check, _ in checks().values():
        for case in cases(check, "default"):
            if case.model and case.strategy.name in STRATEGIES:
                found.setdefault((check.id, case.strategy.name), case.id)
    return sorted(found.values())


def test_every_check_gets_a_script_or_a_reason() -> None:
    refused = {}
    for case_id in one_case_of_each_check():
        try:
            text = script(case_id)
        except InputError as error:
            refused[case_id.split("/")[0]] = str(error)
            continue
        tree = ast.parse(text)
        imported = {
            (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]  # type: ignore[union-attr]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert imported - set(sys.stdlib_module_names) <= PACKAGES, case_id
        asked = case_id.split("/")[0] in {*QUESTIONS, *BY_SETTING}
        assert asked or f"--case '{case_id}'" in text.split('"""')[1], case_id
    assert all("\n" not in reason for reason in refused.values())
    words = (*OUTSIDE.values(), "4-bit", "has no inputs")
    assert all(any(word in reason for word in words) for reason in refused.values()), refused


def test_every_question_belongs_to_a_check_and_is_written() -> None:
    template = (Path(__file__).parent.parent / "conformance/reproduce_questions.py.j2").read_text()
    assert {*QUESTIONS, *BY_SETTING} <= set(checks())
    names = {name for names in QUESTIONS.values() for name in names} - {"targets_of_experts"}
    assert all(f"def ask_{name}(make)" in template for name in names)


@pytest.mark.parametrize(
    "case_id",
    [
        "M03/gemma3n/-/single",
        "M03/mixtral/-/single",
        "M04/gemma4-e2b/-/single",
        "M05/gemma4-e2b/ckpt-reentrant/single",
        "M05/mixtral/ckpt-reentrant/single",
        "M07/gemma4-e2b/-/single",
        "A06/gemma4-dense/images/single",
        "A06/gemma4-unified/images/single",
        "A07/gemma4-dense/-/single",
        "V04/gemma4-dense/images/single",
        "V04/qwen3_5/images/single",
        "L01/gemma4-dense/images/single",
        "L02/gemma4-dense/fp64/single",
        "L02/gemma4-text/fp64/single",
        "L06/gemma4-text/-/single",
        "L08/qwen3_5/fp64/single",
        "L08/mixtral/fp64/single",
        "R03/mixtral/-/single",
        "R05/mixtral/-/single",
        "R10/gemma4-moe/-/single",
        "P02/mixtral/lora/single",
        "P03/mixtral/lora/single",
        "P05/gemma4-dense/lora/single",
        "P05/mixtral/lora/single",
        "P07/mixtral/lora-experts/single",
        "S01/gemma4-e2b/packed/single",
        "S03/qwen3_5/packed/single",
        "S04/mixtral/packed/single",
        "C01/gemma4-e2b/-/single",
        "C06/mixtral/lora-experts/single",
        "X06/gemma4-moe/-/fsdp2",
        "X06/mixtral/-/fsdp2",
    ],
)
def test_a_script_fails_where_the_stock_stack_is_known_to(
    case_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "script.py"
    path.write_text(script(case_id))
    monkeypatch.setattr(sys, "argv", [str(path)])
    known = expected(case_id, EXPECTATIONS)
    shows_it = known.raises if known else ()  # an exception shows it as well
    with contextlib.chdir(tmp_path):
        try:
            status = runpy.run_path(str(path))["main"]()
        except shows_it as error:
            status = int(type(error) is not AssertionError)
    assert status == int(known is not None), capsys.readouterr().out


def test_an_adapter_is_carried_from_one_version_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "script.py"
    path.write_text(script("C04/mixtral/lora-experts/single"))
    for arguments in ([], [str(tmp_path / "kept")], [str(tmp_path / "kept")]):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        assert runpy.run_path(str(path))["main"]() == 0
    said = capsys.readouterr().out
    assert "usage" in said and "written to" in said and "agree" in said
