"""Before upgrading: both environments, both runs, the comparison, and who is to blame."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from conformance.annotations import read_annotations
from conformance.attribution import Ask, attribute, bisect
from conformance.compare import WORKS, Comparison, compare
from conformance.environments import (
    Environment,
    Pins,
    build_full,
    build_layer,
    cache_root,
    complete,
    parse_pins,
    releases_between,
    resolve,
)
from conformance.errors import InputError
from conformance.report import Report, one_line, write
from conformance.schema_snapshot import committed_difference
from conformance.suite_run import Run, Selection, start, stop_all

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """An upgrade to judge. before, after: texts of `NAME==VERSION`; jobs: runs at once (0: as many
    as cores); root: the cache; keep: a folder to write both reports into."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    selection: Selection = Selection()
    bisect: bool = False
    full_environment: bool = False
    jobs: int = 0
    root: Path | None = None
    keep: Path | None = None


class Upgrade:
    """One judgement: environments and runs are kept, so an interrupted one continues."""

    def __init__(self, request: Request, say: Say, progress: Callable[[Sequence[Run]], None]):
        self.request = request
        self.say = say
        self.progress = progress
        self.root = request.root or cache_root()

    def judge(self) -> Comparison:
        """Resolve both sides, build, run, compare, attribute. Raises InputError."""
        old = parse_pins(self.request.before, "--from")
        new = parse_pins(self.request.after, "--to")
        old, new = complete(old, new), complete(new, old)
        check_markers(self.request.selection.markers)
        began = time.monotonic()
        environments = self.environments((old, new))
        labels = (f"from {words(old)}", f"to {words(new)}")
        prepared = time.monotonic()
        before, after = self.run(
            list(zip(environments, labels, strict=True)), self.request.selection
        )
        ran = time.monotonic()
        if self.request.keep:
            self.keep(before, after)
        found = compare(before, after, read_annotations(), committed_difference(before, after))
        found = self.with_commands(found)
        beside = time.monotonic() - ran + prepared - began
        self.say(f"both runs: {ran - prepared:.1f} s, and {beside:.1f} s beside them")
        if old == new:
            return found
        return replace(found, attribution=self.attribute(found, old, new))

    def with_commands(self, found: Comparison) -> Comparison:
        """The comparison with commands that repeat each break between the same two versions: a
        plain pytest would judge the active environment."""
        sides = (("--from", self.request.before), ("--to", self.request.after))
        words = [word for name, pins in sides for word in (name, " ".join(pins))]
        if self.request.selection.impl != Selection.impl:
            words += ["--impl", self.request.selection.impl]
        broken = [
            replace(c, repeat=shlex.join(["conformance", "upgrade", *words, "--case", c.case_id]))
            for c in found.sections["broken"]
        ]
        return replace(found, sections={**found.sections, "broken": tuple(broken)})

    def environments(self, sides: Sequence[Pins]) -> list[Environment]:
        """The environments of both sides; every requirement is checked before any is built.

        Raises InputError.
        """
        self.say("checking the requirements")
        with ThreadPoolExecutor() as at_once:
            layers = list(at_once.map(self.resolved, sides))
            return list(at_once.map(self.build, layers, sides))

    def resolved(self, pins: Pins) -> Pins:
        """What the layer of some pins must hold."""
        return resolve(pins, self.root)

    def keep(self, before: Report, after: Report) -> None:
        """Write both reports where the user wants them."""
        folder = self.request.keep
        assert folder is not None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--keep {folder}: {error.strerror}") from error
        write(before, folder / "before.json")
        write(after, folder / "after.json")

    def build(self, layer: Pins, pins: Pins) -> Environment:
        """The environment of a side."""
        began = time.monotonic()
        if self.request.full_environment:
            found, what = build_full({**layer, **pins}, self.root), "an environment of its own"
        else:
            found, what = build_layer(layer, self.root), words(layer) or "as installed"
        self.say(f"environment {words(pins)}: {what} ({time.monotonic() - began:.1f} s)")
        if found.layer:
            self.say(f"    to work in it: PYTHONPATH={shlex.quote(str(found.layer))}")
        return found

    def run(self, sides: Sequence[tuple[Environment, str]], selection: Selection) -> list[Report]:
        """The reports of some environments, as many at once as asked for."""
        at_once = self.request.jobs or min(len(sides), max(1, (os.cpu_count() or 1)))
        waiting = list(sides)
        runs: list[Run] = []
        try:
            while waiting or not all(run.poll() for run in runs):
                while waiting and sum(not run.poll() for run in runs) < at_once:
                    environment, label = waiting.pop(0)
                    runs.append(start(environment, selection, label, self.root))
                self.progress(runs)
                time.sleep(0.05)
            self.progress(runs)
        except BaseException:
            stop_all(runs)
            raise
        return [run.result() for run in runs]

    def attribute(self, found: Comparison, old: Pins, new: Pins) -> Mapping[str, str]:
        """Who is to blame for each broken case, and thanks to whom each fixed one is, in words.

        Fixed cases are asked about only where that is free (one package moved) or with `bisect`.
        """
        said: dict[str, str] = {}
        asked = [("broken", self.ask, "passes")]
        if self.request.bisect or sum(old[name] != new[name] for name in new) == 1:
            asked.append(("fixed", self.ask_inverted, "fails"))
        for section, ask, word in asked:
            cases = [change.case_id for change in found.sections[section]]
            groups: dict[tuple[str, ...], list[str]] = {}
            for case, names in attribute(cases, old, new, ask, self.say).items():
                groups.setdefault(names, []).append(case)
            for names, group in groups.items():
                said.update(dict.fromkeys(group, move_words(names, old, new)))
                if self.request.bisect and len(names) == 1:
                    said.update(self.narrow(names[0], group, old, new, ask, word))
        return said

    def narrow(
        self, name: str, cases: Sequence[str], old: Pins, new: Pins, ask: Ask, word: str
    ) -> Mapping[str, str]:
        """The release of one package that changed each case."""
        try:
            releases = releases_between(name, old[name], new[name])
        except InputError as error:
            self.say(f"not bisected: {error}")
            return {}
        if not releases:
            self.say(f"{name}: going back from {old[name]} to {new[name]} is not bisected")
            return {}
        first = bisect(cases, name, old, releases, ask, self.say)
        before = dict(zip(releases, [old[name], *releases], strict=False))
        return {
            case: f"{name} {release} ({word} with {before[release]})"
            for case, release in first.items()
        }

    def ask_inverted(self, pins: Pins, cases: Sequence[str]) -> Mapping[str, str]:
        """The same as `ask` with working and failing exchanged: to find what fixed a case."""
        verdicts = self.ask(pins, cases)
        return {case: "failed" if v in WORKS else "passed" for case, v in verdicts.items()}

    def ask(self, pins: Pins, cases: Sequence[str]) -> Mapping[str, str]:
        """Verdicts of some cases under some pins."""
        environment = self.build(self.resolved(pins), pins)
        selection = replace(self.request.selection, cases=tuple(cases), markers="")
        report = self.run([(environment, words(pins))], selection)[0]
        return {row.case_id: row.verdict for row in report.rows}


def check_markers(text: str) -> None:
    """Refuse what pytest would refuse only in its run. Raises InputError."""
    from _pytest.mark.expression import Expression

    try:
        Expression.compile(text)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"-m {one_line(text, 80)!r}: {one_line(str(error))}") from None


def words(pins: Mapping[str, str]) -> str:
    """`peft 0.20.0, transformers 5.17.0`."""
    return ", ".join(f"{name} {number}" for name, number in sorted(pins.items()))


def move_words(names: Sequence[str], old: Pins, new: Pins) -> str:
    """Blame in words; several packages break it only together."""
    moves = [f"{name} {old[name]} → {new[name]}" for name in names]
    return " together with ".join(moves)
