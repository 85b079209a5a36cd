"""What a run was asked for, before anything is collected: a mistake is one line (no torch).

The plugin is loaded in every pytest run of an environment, so names are judged only where the run
asks for this suite's checks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from itertools import product
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

CHECKS = Path(__file__).parent / "checks"
_OPERATORS = {"and", "or", "not", "True", "False", "None"}
_WORD = re.compile(r"[\w:+\-.\[\]\\/]+")  # what pytest takes for a name in an expression
_WITH_VALUES = re.compile(r"\([^()]*=[^()]*\)")  # the keywords of a marker, not names of markers
_WILD = re.compile(r"[*?\[]")


def refuse_mistakes(config: pytest.Config) -> None:
    """UsageError, one line, for a report that cannot be written, and for names that do not exist
    in `-m`, `--case` and `--shard`."""
    shard(config)
    wrong = _unwritable(config.getoption("report"))
    if wrong is None and for_checks(config):
        expression = config.getoption("-m")
        wrong = next(_unknown_markers(expression, config.getini("markers")), None)
        wrong = wrong or next(filter(None, map(_unknown_part, config.getoption("case"))), None)
    if wrong is not None:
        raise pytest.UsageError(wrong)


def for_checks(config: pytest.Config) -> bool:
    """Whether the run's arguments name this suite's checks."""
    here = CHECKS.resolve()
    if config.getoption("pyargs") and any(a.split(".")[0] == "conformance" for a in config.args):
        return True
    started = config.invocation_params.dir
    places = [(started / arg.partition("::")[0]).resolve() for arg in config.args]
    return any(p in (here, here.parent) or here in p.parents for p in places)


def may_match(expression: str, certain: Collection[str], possible: Collection[str]) -> bool:
    """Whether `-m expression` can match what has all markers of `certain` and any of `possible`.

    Raises SyntaxError for an expression that is none; pytest says later what is wrong with it.
    """
    compiled = Expression.compile(expression)
    open_ = sorted(set(possible) & set(re.findall(r"[\w+-]+", expression)))
    for present in product((False, True), repeat=len(open_)):
        has = {*certain, *(name for name, here in zip(open_, present, strict=True) if here)}
        if compiled.evaluate(lambda name, /, _has=has, **_: name in _has):
            return True
    return False


def shard(config: pytest.Config) -> tuple[int, int]:
    """(index, count) of `--shard`; UsageError when it is not I/N with 1 ≤ I ≤ N."""
    text = config.getoption("shard") or "1/1"
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise pytest.UsageError(f"--shard {text}: write I/N, such as 2/8, with 1 <= I <= N")
    return int(index), int(count)


def _unwritable(report: str | None) -> str | None:
    """Why `--report` cannot be written, known before the run instead of after it."""
    if report is None:
        return None
    target = Path(report)
    if not report or target.is_dir():
        return f"--report {report!r}: give a file, such as report.json"
    if not target.parent.is_dir():
        return f"--report {report}: there is no folder {target.parent}"
    if not os.access(target.parent, os.W_OK | os.X_OK):
        return f"--report {report}: {target.parent} cannot be written to"
    return None


def _unknown_markers(expression: str, lines: Collection[str]) -> Iterator[str]:
    """A sentence for each name in a marker expression that no marker has: it selects nothing."""
    known = {re.split(r"[:(]", line)[0].strip() for line in lines}
    for word in _WORD.findall(_WITH_VALUES.sub("", expression)):
        if word not in known | _OPERATORS:
            close = _close(word, known)
            yield f"-m {expression!r}: no marker {word!r}{close}; see pytest --markers"


def _unknown_part(glob: str) -> str | None:
    """The first part of a case id, before any wildcard, that names nothing; check ids are known
    only when the checks are collected."""
    from conformance.families import MODELS
    from conformance.settings import Setting
    from conformance.strategies import STRATEGIES

    kinds = ("check", "model", "setting", "strategy")
    for kind, part in zip(kinds, glob.split("/"), strict=False):
        if _WILD.search(part):
            return None
        known = {"model": list(MODELS), "strategy": list(STRATEGIES)}.get(kind)
        if known is not None and part != "-" and part not in known:
            return f"--case {glob!r}: no {kind} {part!r}{_close(part, known)}"
        if kind == "setting":
            try:
                Setting.parse(part)
            except ValueError as error:
                return f"--case {glob!r}: {error}"
    return None


def _close(word: str, known: Collection[str]) -> str:
    found = get_close_matches(word, known, 3, 0.5)
    return f"; close: {', '.join(found)}" if found else ""
