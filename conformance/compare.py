"""Two reports → a Comparison: what broke, what is fixed, what is no longer covered, what drifted.

Joined on case ids. A known failure (`xfailed`) counts as not working: an upgrade that turns a pass
into one is a break, named with its issue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from conformance.annotations import ExpectedChange
from conformance.drift import drifts, speed_drifts
from conformance.errors import InputError
from conformance.report import Report, Row

WORKS = frozenset({"passed", "xpassed"})
FAILS = frozenset({"failed", "error", "timeout", "xfailed"})

# section -> (mark, heading), in the order in which a comparison tells them
SECTIONS: dict[str, tuple[str, str]] = {
    "broken": ("!", "broken"),
    "fixed": ("*", "fixed"),
    "skipped": ("-", "newly skipped"),
    "gone": ("-", "gone"),
    "uncovered": ("x", "failing, not covered before"),
    "still": ("~", "still failing"),
    "drift": ("-", "drift"),
    "speed": ("-", "speed and memory"),
    "schema": ("~", "schema"),
    "expected": ("~", "expected changes"),
    "covered": ("+", "newly covered"),
    "new": ("+", "new checks"),
    "retired": ("~", "retired checks"),
}


@dataclass(frozen=True)
class Change:
    """One line of a comparison. before, after: verdicts; text: what there is to know; issue: a
    link; repeat: the command that shows it on the new side."""

    case_id: str
    before: str = ""
    after: str = ""
    text: str = ""
    issue: str = ""
    repeat: str = ""

    @property
    def check(self) -> str:
        """The check's id, or an empty string for a change that is no case."""
        return self.case_id.split("/")[0] if self.case_id.count("/") == 3 else ""


@dataclass(frozen=True)
class Comparison:
    """Two runs and their differences, by section; `attribution` names the package (and release) to
    blame for a broken case."""

    before: Report
    after: Report
    sections: Mapping[str, tuple[Change, ...]]
    notes: tuple[str, ...] = ()
    attribution: Mapping[str, str] = field(default_factory=dict)

    @property
    def exit(self) -> int:
        """1 when something broke, else 0."""
        return int(bool(self.sections.get("broken")))

    @cached_property
    def claims(self) -> dict[str, str]:
        """What each check claims, as either report says."""
        both = {**self.before.checks, **self.after.checks}
        return {name: claim for name, (claim, _) in both.items()}

    @property
    def moved(self) -> str:
        """`transformers 5.17.0 → 5.23.0, peft 0.20.0 → 0.21.2`, or `same versions`."""
        old, new = self.before.versions, self.after.versions
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return ", ".join(f"{n} {old.get(n, 'none')} → {new.get(n, 'none')}" for n in names) or (
            "same versions"
        )

    @property
    def verdict(self) -> str:
        """The verdict line."""
        counts = [
            f"{len(self.sections[name])} {heading}"
            for name, (_, heading) in SECTIONS.items()
            if self.sections.get(name)
        ]
        common = len(self.before.by_id().keys() & self.after.by_id().keys())
        word = "BROKEN" if self.exit else "nothing broke"
        return f"{word}: {self.moved}: {', '.join(counts) or 'no difference'} ({common} cases)"


def compare(
    before: Report,
    after: Report,
    expected: Sequence[ExpectedChange] = (),
    schema: Sequence[str] = (),
) -> Comparison:
    """Compare two runs. expected: announced changes; schema: differences of two snapshots.

    Raises InputError when the reports have nothing to say about one another.
    """
    _refuse(before, after)
    found: dict[str, list[Change]] = {name: [] for name in SECTIONS}
    old, new = before.by_id(), after.by_id()
    suites_differ = before.suite_version != after.suite_version
    retired = {r.check for r in before.rows} - {r.check for r in after.rows}
    added = {r.check for r in after.rows} - {r.check for r in before.rows}
    if suites_differ:
        found["retired"] = [Change(name, text=_cases_of(name, before)) for name in sorted(retired)]
        found["new"] = [Change(name, text=_cases_of(name, after)) for name in sorted(added)]
    for case_id in sorted({*old, *new}):
        check = case_id.split("/")[0]
        if suites_differ and check in retired | added:
            continue
        section, change = _difference(case_id, old.get(case_id), new.get(case_id))
        if section == "gone" and change.before in WORKS and after.uncollected:
            lost = f"not collected: {'; '.join(after.uncollected)}"
            section, change = "broken", replace(change, text=lost)
        if section:
            found[section].append(change)
    found["drift"] += drifts(old, new)
    found["speed"] += speed_drifts(before, after)
    found["schema"] = [Change(line) for line in schema]
    _set_apart(found, expected, before, after)
    sections = {name: tuple(changes) for name, changes in found.items()}
    return Comparison(before, after, sections, tuple(_notes(before, after)))


def _refuse(before: Report, after: Report) -> None:
    for name, report in (("first", before), ("second", after)):
        if not report.rows and not report.bench:
            raise InputError(f"cannot compare: the {name} report has no case and no benchmark")
    for what in ("matrix", "selection"):
        old, new = getattr(before, what), getattr(after, what)
        if old != new:
            raise InputError(
                f"cannot compare: the {what} differs ({old or 'everything'} against"
                f" {new or 'everything'}); run both alike"
            )
    cases = before.by_id().keys() & after.by_id().keys()
    if not cases and not (before.bench and after.bench):
        raise InputError("cannot compare: the reports have no case in common")


def _notes(before: Report, after: Report) -> list[str]:
    """What a reader must know before believing the rest."""
    pairs: tuple[tuple[str, Callable[[Report], object]], ...] = (
        ("suites", lambda r: r.suite_version),
        ("implementations", lambda r: r.implementation),
        ("devices", lambda r: r.hardware.get("device")),
        ("machines", lambda r: (r.hardware.get("name"), r.hardware.get("platform"))),
        ("Python versions", lambda r: r.versions.get("python")),
    )
    notes = []
    for what, ask in pairs:
        old, new = ask(before), ask(after)
        if old != new:
            notes.append(f"different {what}: {_words(old)} → {_words(new)}")
    for which, report in (("first", before), ("second", after)):
        notes += [f"the {which} run could not import {text}" for text in report.uncollected]
    return notes


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _cases_of(check: str, report: Report) -> str:
    count = sum(row.check == check for row in report.rows)
    claim = report.checks.get(check, ("",))[0]
    return f"{count} case{'s' * (count != 1)}{': ' * bool(claim)}{claim}"


def _difference(case_id: str, old: Row | None, new: Row | None) -> tuple[str, Change]:
    """The section that a case falls into (empty: no difference), and its line."""
    if old is None or new is None:
        row = new or old
        assert row is not None
        if new is None:
            return "gone", Change(case_id, row.verdict, "", "the case is not in the second report")
        return ("uncovered" if new.verdict in FAILS else "covered"), _change(None, new)
    was, now = _state(old.verdict), _state(new.verdict)
    section = {
        ("works", "fails"): "broken",
        ("fails", "works"): "fixed",
        ("works", "skips"): "skipped",
        ("fails", "skips"): "skipped",
        ("skips", "works"): "covered",
        ("skips", "fails"): "uncovered",
        ("fails", "fails"): "still",
    }.get((was, now), "")
    return section, _change(old, new)


def _state(verdict: str) -> str:
    return "works" if verdict in WORKS else "fails" if verdict in FAILS else "skips"


def _change(old: Row | None, new: Row) -> Change:
    text = (new.message or new.reason).removeprefix(f"{new.case_id}: ")
    if new.verdict == "xfailed":
        text = f"known: {new.reason or new.message}"
    elif old and new.verdict in WORKS:
        text = (old.reason or old.message).removeprefix(f"{old.case_id}: ")
    elif old and old.verdict == "xfailed" and new.verdict in FAILS:
        text = f"no longer fails as expected: {text}"
    issue = new.issue or (old.issue if old else "")
    return Change(new.case_id, old.verdict if old else "", new.verdict, text, issue, new.repeat)


def _set_apart(
    found: dict[str, list[Change]],
    expected: Sequence[ExpectedChange],
    before: Report,
    after: Report,
) -> None:
    """Move every change that an annotation explains into its own section."""
    for kind in ("broken", "fixed", "skipped", "gone", "drift"):
        rest: list[Change] = []
        for change in found[kind]:
            reason = next(
                (
                    entry
                    for entry in expected
                    if entry.explains(kind, change.case_id, before.versions, after.versions)
                ),
                None,
            )
            if reason is None:
                rest.append(change)
                continue
            text = f"{SECTIONS[kind][1]}, as announced: {reason.what} [{change.text}]"
            found["expected"].append(
                Change(change.case_id, change.before, change.after, text, reason.thread)
            )
        found[kind] = rest
