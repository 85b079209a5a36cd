"""Which package, and which release of it, is to blame for a break: swap one at a time, then halve.

Pure logic over one question, `ask(pins, case_ids) -> verdict by case id`, which the caller answers
by running the suite (or from its cache), raising InputError where pins cannot be had together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from conformance.compare import FAILS
from conformance.environments import Pins
from conformance.errors import InputError

Ask = Callable[[Pins, Sequence[str]], Mapping[str, str]]
Say = Callable[[str], None]


def _failing(verdicts: Mapping[str, str]) -> set[str]:
    return {case for case, verdict in verdicts.items() if verdict in FAILS}


def attribute(
    broken: Sequence[str], old: Pins, new: Pins, ask: Ask, say: Say = lambda _: None
) -> dict[str, tuple[str, ...]]:
    """Package names to blame for each broken case; several: only together; none: not found.

    First each package alone is moved to its new version (sufficient to break); what no single
    one breaks is tried the other way round: each package alone is moved back (necessary).
    """
    moved = sorted(name for name in new if old.get(name) != new[name])
    if len(moved) == 1:
        return dict.fromkeys(broken, (moved[0],))
    found: dict[str, tuple[str, ...]] = {}
    left = list(broken)
    for name in moved:
        if left:
            bad = _failing(_try(old | {name: new[name]}, left, ask, say))
            found.update(dict.fromkeys((case for case in left if case in bad), (name,)))
            left = [case for case in left if case not in found]
    for name in moved:
        asked = [case for case in left if len(found.get(case, ())) < len(moved)]
        if asked:
            verdicts = _try(new | {name: old[name]}, asked, ask, say)
            for case in set(verdicts) - _failing(verdicts):
                found[case] = (*found.get(case, ()), name)
    return found


def _try(pins: Pins, cases: Sequence[str], ask: Ask, say: Say) -> Mapping[str, str]:
    """An answer, or an empty one where the mixture cannot be installed."""
    try:
        return ask(pins, cases)
    except InputError as error:
        say(f"cannot be tried: {error}")
        return {}


def bisect(
    cases: Sequence[str],
    name: str,
    base: Pins,
    releases: Sequence[str],
    ask: Ask,
    say: Say = lambda _: None,
) -> dict[str, str]:
    """The first release of `name` in which each case fails, all others at `base`.

    releases: ascending; the last is known to fail every case, what lies before the first to pass.
    A release that cannot be installed is passed over, so the answer may then be a later one.
    """
    found: dict[str, str] = {}
    _halve(list(cases), 0, len(releases) - 1, name, base, list(releases), ask, say, found)
    return found


def _halve(
    cases: list[str],
    low: int,
    high: int,
    name: str,
    base: Pins,
    releases: list[str],
    ask: Ask,
    say: Say,
    found: dict[str, str],
) -> None:
    """Every case fails at `high` and passes before `low`; cases may break at different releases."""
    if not cases:
        return
    if low == high:
        found.update(dict.fromkeys(cases, releases[high]))
        return
    middle = (low + high) // 2
    say(f"bisecting {name}: {releases[middle]} ({high - low + 1} releases left)")
    try:
        bad = _failing(ask(base | {name: releases[middle]}, cases))
    except InputError as error:
        say(f"{name} {releases[middle]} passed over: {error}")
        rest = releases[:middle] + releases[middle + 1 :]
        _halve(cases, low, high - 1, name, base, rest, ask, say, found)
        return
    early = [case for case in cases if case in bad]
    late = [case for case in cases if case not in bad]
    _halve(early, low, middle, name, base, releases, ask, say, found)
    _halve(late, middle + 1, high, name, base, releases, ask, say, found)
