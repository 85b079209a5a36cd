"""The `conformance` command: subcommands without logic. No torch is imported here.

A mistake of the user is one line on stderr and exit status 2, never a traceback.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from conformance import __version__
from conformance.cli_plan import plan_command
from conformance.errors import InputError
from conformance.report import ReportError, one_line

INTERRUPTED = 130
app = typer.Typer(
    name="conformance",
    help="Does a fine-tuning stack train rightly, and what does an upgrade break?",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Format(StrEnum):
    """How a comparison is printed."""

    text = "text"
    markdown = "markdown"
    json = "json"
    html = "html"


class Matrix(StrEnum):
    """Which cases a run takes."""

    default = "default"
    full = "full"


Reports = Annotated[list[Path], typer.Argument(metavar="A.json [B.json ...]")]
Out = Annotated[Path | None, typer.Option(help="Write here instead of printing.")]
Impl = Annotated[str, typer.Option(help="reference, transformers, or package.module:attribute.")]


@app.command()
def report(
    reports: Reports,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page here.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print markdown, for a CI summary.")] = False,
) -> None:
    """Show reports as a page, markdown or matrix."""
    from conformance import records

    print(records.show(reports, html, markdown), end="")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json")],
    after: Annotated[Path, typer.Argument(metavar="B.json")],
    format: Annotated[Format, typer.Option(help="Form of the output.")] = Format.text,
    out: Out = None,
    annotations: Annotated[
        Path | None, typer.Option(help="Expected changes (TOML); the suite's own if not given.")
    ] = None,
) -> None:
    """Compare two reports; status 1 if broken.

    What broke, is fixed, no longer covered, drifted, slower, or announced upstream.
    """
    from conformance import records

    text, status = records.compared(before, after, format.value, annotations)
    records.put(text, out)
    raise typer.Exit(status)


@app.command()
def upgrade(
    before: Annotated[list[str], typer.Option("--from", help='"transformers==5.17.0 peft==..."')],
    after: Annotated[list[str], typer.Option("--to", help='"transformers==5.23.0"')],
    markers: Annotated[str, typer.Option("-m", help="Marker expression, as pytest's.")] = "",
    impl: Impl = "transformers",
    matrix: Annotated[Matrix, typer.Option(help="Which cases.")] = Matrix.default,
    case: Annotated[list[str] | None, typer.Option(help="Only cases that match.")] = None,
    bisect: Annotated[bool, typer.Option(help="Narrow each break to a release.")] = False,
    full_environment: Annotated[
        bool, typer.Option(help="Whole environments instead of layers (minutes).")
    ] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Runs at once; 0: as many as cores.")] = 0,
    format: Annotated[Format, typer.Option(help="Form of the output.")] = Format.text,
    out: Out = None,
    keep: Annotated[Path | None, typer.Option(help="Write both reports into this folder.")] = None,
) -> None:
    """Judge an upgrade before making it.

    Runs the suite in both environments, compares, and says which package is to blame.
    """
    from conformance import records
    from conformance.suite_run import Selection
    from conformance.upgrade import Request
    from conformance.upgrade_progress import judge

    selection = Selection(impl, markers, matrix.value, tuple(case or ()))
    request = Request(
        tuple(before), tuple(after), selection, bisect, full_environment, jobs, keep=keep
    )
    text, status = records.rendered(judge(request), format.value)
    records.put(text, out)
    raise typer.Exit(status)


@app.command()
def reproduce(
    case_id: Annotated[str, typer.Argument(metavar="CASE_ID")],
    out: Out = None,
) -> None:
    """Write a script that shows a case alone.

    It needs torch, transformers and PEFT, not this suite: attach it to an upstream issue.
    """
    from conformance import records
    from conformance.reproduce import script

    records.put(script(case_id), out)


app.command("plan")(plan_command)


@app.command()
def new_adapter(
    path: Annotated[Path, typer.Argument(help="File to write, such as mine.py.")],
) -> None:
    """Write a typed adapter for your own stack."""
    from conformance.new_adapter import write_adapter

    print(write_adapter(path))


@app.command()
def catalogue(out: Out = None) -> None:
    """Print the catalogue of checks (markdown)."""
    from conformance import records
    from conformance.check_list import catalogue_markdown

    records.put(catalogue_markdown(), out)


@app.command()
def schema(
    out: Out = None,
    against: Annotated[Path | None, typer.Option(help="Print differences to this one.")] = None,
) -> None:
    """Snapshot what the installed versions are.

    Config fields, signatures, modules, parameters, parallel plans, what LoRA specs adapt.
    """
    from conformance import records
    from conformance.schema_snapshot import command

    records.put(command(against), out)


def _version(value: bool) -> None:
    if value:
        print(f"finetune-conformance {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Conformance of fine-tuning stacks."""


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        status = app(args=arguments, standalone_mode=False)
    except (InputError, ReportError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        return 0
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors, or typer's copy of click
            return _complain(f"{error.format_message()} (--help tells more)")
        if type(error).__name__ in ("Exit", "Abort"):
            return int(getattr(error, "exit_code", 1))
        raise
    if status == INTERRUPTED:  # typer's own answer to Ctrl-C
        return _interrupted()
    return status if isinstance(status, int) else 0


def _interrupted() -> int:
    print("conformance: interrupted; the same command continues", file=sys.stderr)
    return INTERRUPTED


def _complain(text: str) -> int:
    print(f"conformance: {one_line(text)}", file=sys.stderr)
    return 2


def main() -> None:
    """The console script."""
    sys.exit(run())
