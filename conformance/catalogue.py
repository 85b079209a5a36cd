"""Every check there is, by id, and a check run directly, without pytest (for mutants and tools)."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from conformance.case import Case, Check
from conformance.check import check_of
from conformance.implementation import Loaded


@cache
def checks() -> dict[str, tuple[Check, Callable[..., None]]]:
    """Check id -> (check, test function), in the order of files and definitions.

    Raises ValueError when two functions claim one id. Imports the check modules, and so torch.
    """
    found: dict[str, tuple[Check, Callable[..., None]]] = {}
    import_module("conformance.checks.conftest")
    for path in sorted((Path(__file__).parent / "checks").glob("test_*.py")):
        module = import_module(f"conformance.checks.{path.stem}")
        for function in vars(module).values():
            check = check_of(function)
            if check is None or function.__module__ != module.__name__:
                continue
            if check.id in found:
                raise ValueError(f"check {check.id} is defined twice, again in {path.name}")
            found[check.id] = (check, function)
    return found


class Declined(Exception):
    """A check called `unsupported` or `unavailable`."""


def run_check(case: Case, loaded: Loaded, device: str = "cpu") -> dict[str, float]:
    """Run one case here and now; returns what it measured.

    Raises what the check raises (AssertionError: the claim does not hold), and Declined.
    """
    from conformance import processors
    from conformance.subject import bound

    function = checks()[case.check.id][1]
    measured: dict[str, float] = {}

    def decline(reason: str) -> None:
        raise Declined(reason)

    with (
        tempfile.TemporaryDirectory(prefix="check-") as scratch,
        bound(loaded, case, device) as subject,
    ):
        offered: dict[str, Any] = {
            "case": case,
            "subject": subject,
            "measured": measured,
            "tmp_path": Path(scratch),
            "unsupported": decline,
            "unavailable": decline,
            "curve": lambda *args, **options: None,
        }
        wanted = inspect.signature(function).parameters
        for name in set(wanted) & set(processors.FIXTURES):
            assert case.model is not None
            offered[name] = processors.kit_of(case.model.name, name, decline)
        unknown = set(wanted) - set(offered)
        if unknown:
            raise TypeError(f"check {case.check.id} asks for {sorted(unknown)}, offered by pytest")
        function(**{name: offered[name] for name in wanted})
    return measured
