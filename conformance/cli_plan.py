"""`conformance plan CONFIG`: what to write to train a model, each value with its reason.

Nothing heavy is imported until the command runs, so that `--help` needs no torch.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from conformance.paths import reference_package
from conformance.settings import Setting
from conformance.strategies import STRATEGIES

FORMATS = ("yaml", "args", "json")
BAD_INPUT, REFUSED = 2, 1
_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "host")


def plan_command(
    path: Annotated[Path, typer.Argument(help="A config.json, or the folder that holds one.")],
    setting: Annotated[
        str, typer.Option(help="How it is trained, such as bf16+lora+ckpt-nonreentrant+packed.")
    ] = "bf16+lora",
    strategy: Annotated[
        str, typer.Option(help=f"How it is spread: {', '.join(STRATEGIES)}.")
    ] = "single",
    format: Annotated[str, typer.Option(help="yaml (axolotl's keys), args or json.")] = "yaml",
    explain: Annotated[
        bool, typer.Option("--explain", help="Add where and why the plan differs from the guide.")
    ] = False,
    compare_strategies: Annotated[
        bool, typer.Option("--compare-strategies", help="Rank the strategies by memory per GPU.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="A wish as KEY=VALUE, such as lora_r=32 or ranks=8."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, max=1 << 24, help="Tokens of a row, for the comparison of memory.")
    ] = 2048,
) -> None:
    """Plan the training of a model from its config.json; nothing is downloaded or loaded."""
    try:
        request = _request(Path(path), setting, strategy, format, option or [])
        if compare_strategies:
            output = _comparison(request, format, tokens)
        else:
            output = _plan(request, format, explain)
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


@dataclass(frozen=True)
class _Request:
    """A request whose words are all known. root: the reference's package. traits: of the model."""

    path: Path
    setting: Setting
    strategy: str
    wishes: dict[str, Any]
    root: str
    traits: Any


def _request(path: Path, setting: str, strategy: str, format: str, options: list[str]) -> _Request:
    """Read what was asked for; _Stop, one line, for a word or a config that makes no sense."""
    if format not in FORMATS:
        raise _Stop(f"--format {format}: it is one of {', '.join(FORMATS)}")
    if strategy not in STRATEGIES:
        raise _Stop(f"--strategy {strategy}: it is one of {', '.join(STRATEGIES)}")
    try:
        asked = Setting.parse(setting)
    except ValueError as error:
        raise _Stop(f"--setting: {error}") from None
    wishes = dict(_wish(text) for text in options)
    root = reference_package()
    try:
        with _one_line(root):
            traits = import_module(f"{root}.detect").detect(path, wishes.get("auto_class"))
    except _Stop as stop:
        if str(path) in str(stop):
            raise
        raise _Stop(f"{path}: {stop}", stop.status) from None
    if not traits.known:
        raise _Stop(f"{path}: {traits.notes[0].partition(';')[0]}; is it new, or misspelt?")
    return _Request(path, asked, strategy, wishes, root, traits)


@contextmanager
def _one_line(root: str) -> Iterator[None]:
    """Turn the reference's refusals and config errors into one line and an exit status."""
    errors = import_module(f"{root}.errors")
    try:
        yield
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


def _plan(request: _Request, format: str, explain: bool) -> list[Any]:
    """The plan in the format asked for, and the deviations."""
    root, path = request.root, request.path
    make = import_module(f"{root}.plan").plan
    with _one_line(root):
        plan = make(request.traits, request.setting, request.strategy, **request.wishes)
    export = import_module(f"{root}.export")
    told = [_explained(export, plan)] if explain else []
    if format == "json":
        body = json.loads(export.to_json(plan))
        if explain:
            body["_deviations"] = [vars(row) for row, _ in export.rows_of(plan)]
        return [json.dumps(body, indent=2, ensure_ascii=False) + "\n"]
    if format == "args":
        notes = [f"# ! {sentence}\n" for sentence in plan.warnings]
        return [*notes, _coloured(export.to_args_text(plan), "python"), *told]
    folder = path if path.is_dir() else path.parent
    return [_coloured(export.to_yaml(plan, str(folder)), "yaml"), *told]


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


def _comparison(request: _Request, format: str, tokens: int) -> list[Any]:
    """The strategies by the memory that one GPU needs, least first; refused ones with the
    reason.
    """
    root = request.root
    if util.find_spec(f"{root}.memory") is None:
        raise _Stop("--compare-strategies: this installation has no memory estimate")
    unused = sorted(set(request.wishes) - {"ranks"})
    if unused:
        raise _Stop(f"--compare-strategies takes no option but ranks, not {', '.join(unused)}")
    ranks = request.wishes.get("ranks", 8)
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise _Stop(f"--option ranks={ranks}: it must be a positive whole number")
    compare = import_module(f"{root}.memory").compare_strategies
    with _one_line(root), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about a model that is never trained
        _, config = import_module(f"{root}.detect_config").load_fields(request.path)
        found = compare(config, request.setting, ranks, tokens=tokens)
    if format == "json":
        return [json.dumps([vars(estimate) for estimate in found], indent=2) + "\n"]
    title = f"GiB of one GPU ({request.setting.id}, {ranks} GPUs, {tokens} tokens a row)"
    refused = [
        f"refused: {e.strategy}: {e.refused.removeprefix(f'{e.strategy}: ')}\n"
        for e in found
        if e.refused
    ]
    return [_memory_table([e for e in found if not e.refused], title), *refused]


def _memory_table(found: list[Any], title: str) -> Table:
    table = Table(title=title, box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("strategy")
    for column in (*_PARTS, "total"):
        table.add_column(column, justify="right")
    for estimate in found:
        sizes = [getattr(estimate, part) for part in (*_PARTS, "total")]
        table.add_row(estimate.strategy, *(f"{size / 2**30:.1f}" for size in sizes))
    return table
