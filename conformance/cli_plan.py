"""`conformance plan CONFIG`: what to write to train a model, each value with its reason.

Nothing heavy is imported until the command runs, so that `--help` needs no torch.
"""

from __future__ import annotations

import json
from importlib import import_module, util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from conformance.paths import reference_package
from conformance.settings import Setting
from conformance.strategies import STRATEGIES

FORMATS = ("yaml", "args", "json")
BAD_INPUT, REFUSED = 2, 1


def plan_command(
    path: Annotated[Path, typer.Argument(help="A config.json, or the folder that holds one.")],
    setting: Annotated[
        str, typer.Option(help="How it is trained, such as bf16+lora+ckpt-nonreentrant+packed.")
    ] = "bf16+lora",
    strategy: Annotated[
        str, typer.Option(help=f"How it is spread: {', '.join(STRATEGIES)}.")
    ] = "single",
    format: Annotated[str, typer.Option(help="yaml (axolotl's keys), args or json.")] = "yaml",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="A wish as KEY=VALUE, such as lora_r=32."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Add where and why the plan differs from the guide.")
    ] = False,
    compare_strategies: Annotated[
        bool, typer.Option("--compare-strategies", help="Rank the strategies by memory per GPU.")
    ] = False,
) -> None:
    """Plan the training of a model from its config.json; nothing is downloaded or loaded."""
    try:
        output = _run(path, setting, strategy, format, option or [], explain, compare_strategies)
    except _Stop as stop:
        Console(stderr=True, soft_wrap=True, highlight=False).print(escape(str(stop)))
        raise typer.Exit(stop.status) from None
    console = Console(soft_wrap=True, highlight=False)
    for part in output:
        console.print(part, end="" if isinstance(part, str) else "\n", markup=False)


class _Stop(Exception):
    """One line for the user, and the exit status."""

    def __init__(self, text: str, status: int = BAD_INPUT) -> None:
        super().__init__(" ".join(text.split()))
        self.status = status


def _run(
    path: Path,
    setting: str,
    strategy: str,
    format: str,
    options: list[str],
    explain: bool,
    compare: bool,
) -> list[Any]:
    """The parts to print; _Stop for anything that ends in one line."""
    if format not in FORMATS:
        raise _Stop(f"--format {format}: it is one of {', '.join(FORMATS)}")
    if strategy not in STRATEGIES:
        raise _Stop(f"--strategy {strategy}: it is one of {', '.join(STRATEGIES)}")
    try:
        asked = Setting.parse(setting)
    except ValueError as error:
        raise _Stop(f"--setting: {error}") from None
    wishes = dict(_wish(text) for text in options)
    errors = import_module(f"{reference_package()}.errors")
    try:
        return _plan(path, asked, strategy, format, wishes, explain, compare)
    except errors.Refused as refusal:
        raise _Stop(f"refused: {refusal}", REFUSED) from None
    except errors.ConfigError as error:
        raise _Stop(str(error)) from None


def _wish(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise _Stop(f"--option {text}: write KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _plan(
    path: Path,
    setting: Setting,
    strategy: str,
    format: str,
    wishes: dict[str, Any],
    explain: bool,
    compare: bool,
) -> list[Any]:
    root = reference_package()
    traits = import_module(f"{root}.detect").detect(path, wishes.get("auto_class"))
    if not traits.known:
        raise _Stop(f"{path}: {traits.notes[0].partition(';')[0]}; is it new, or misspelt?")
    if compare:
        return _comparison(root, path, setting, wishes)
    plan = import_module(f"{root}.plan").plan(traits, setting, strategy, **wishes)
    export = import_module(f"{root}.export")
    if format == "json":
        text = export.to_json(plan) + "\n"
        return [text, *([] if not explain else [_explained(export, plan)])]
    folder = path if path.is_dir() else path.parent
    yaml = export.to_yaml(plan, str(folder)) if format == "yaml" else export.to_args_text(plan)
    shown = _coloured(yaml, "yaml" if format == "yaml" else "python")
    notes = [] if format == "yaml" else [f"# ! {sentence}\n" for sentence in plan.warnings]
    return [*notes, shown, *([_explained(export, plan)] if explain else [])]


def _coloured(text: str, language: str) -> Any:
    """Highlighted on a terminal; elsewhere the text as it is, to be piped into a file."""
    if not Console().is_terminal:
        return text
    return Syntax(text, language, background_color="default", word_wrap=True)


def _explained(export: Any, plan: Any) -> Any:
    """The deviations that bear on this plan: a table on a terminal, comment lines elsewhere."""
    if not Console().is_terminal:
        return "".join(f"# {line}\n" for line in export.explain(plan).splitlines())
    table = Table(title="Where this differs from the specification", show_lines=True)
    for column in ("key", "specification", "emitted", "measured", "source"):
        table.add_column(column, overflow="fold")
    for row, names in export.rows_of(plan):
        cells = (", ".join(names), row.says, row.emits, row.measured, row.source)
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _comparison(root: str, path: Path, setting: Setting, wishes: dict[str, Any]) -> list[Any]:
    """The strategies ranked by the memory estimate of `impl/memory.py`."""
    if util.find_spec(f"{root}.memory") is None:
        raise _Stop("--compare-strategies: this installation has no memory estimate")
    result = import_module(f"{root}.memory").compare_strategies(path, setting, **wishes)
    return [result]
