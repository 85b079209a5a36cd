"""A Comparison as text, markdown, JSON and HTML. What comes from reports is escaped or cleaned."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from markupsafe import Markup

from conformance.compare import SECTIONS, Change, Comparison
from conformance.markdown import escape, link
from conformance.page import environment
from conformance.report import one_line

TEXT_LIMIT = 12  # cases shown of a group in text and markdown; JSON and HTML have them all
GROUP_LIMIT = 30


def groups(comparison: Comparison, section: str) -> list[tuple[Change, ...]]:
    """A section's changes that say the same of one check, with one blame; largest group first."""
    found: dict[tuple[str, str, str], list[Change]] = {}
    for change in comparison.sections.get(section, ()):
        blame = comparison.attribution.get(change.case_id, "")
        key = (change.check or change.case_id, _same_words(change), blame)
        found.setdefault(key, []).append(change)
    return sorted((tuple(g) for g in found.values()), key=lambda g: (-len(g), g[0].case_id))


def _same_words(change: Change) -> str:
    """A change's text without its numbers and its case id; drifts differ in nothing else."""
    if change.before == change.after == "passed":
        return ""
    text = change.text.replace(change.case_id, "")
    return "".join(c for c in text if not c.isdigit())[:80]


def to_text(comparison: Comparison) -> str:
    """The comparison for a terminal: the verdict line, then each section that has something."""
    lines = [one_line(comparison.verdict, 600)]
    lines += [f"note: {one_line(note)}" for note in comparison.notes]
    for name, (mark, heading) in SECTIONS.items():
        changes = comparison.sections.get(name, ())
        if not changes:
            continue
        lines += ["", f"{heading} ({len(changes)})"]
        found = groups(comparison, name)
        limit = GROUP_LIMIT if name in ("broken", "fixed") else 8
        for group in found[:limit]:
            lines += _text_group(comparison, mark, group)
        if len(found) > limit:
            lines.append(f"  … and {len(found) - limit} more groups; see --format json")
    return "\n".join(lines) + "\n"


def _text_group(comparison: Comparison, mark: str, group: tuple[Change, ...]) -> Iterator[str]:
    first = group[0]
    claim = comparison.claims.get(first.check, "")
    if len(group) > 1:
        yield f"{mark} {first.check}: {len(group)} cases{': ' * bool(claim)}{one_line(claim)}"
    for change in group[: 1 if len(group) == 1 else 3]:
        arrow = f" {change.before or 'absent'} → {change.after}" if change.after else ""
        lead = f"{mark} " if len(group) == 1 else "    "
        yield f"{lead}{one_line(change.case_id)}{arrow}"
    if len(group) > 3:
        yield f"    … and {len(group) - 3} more"
    if first.text:
        yield f"    {one_line(first.text, 300)}"
    if first.issue:
        yield f"    {one_line(first.issue)}"
    for blame in blames(comparison, group):
        yield f"    because of {one_line(blame)}"
    if mark == "!" and first.check:
        if first.repeat:
            yield f"    repeat: {one_line(first.repeat)}"
        yield f"    script: {shlex.join(['conformance', 'reproduce', one_line(first.case_id)])}"


def blames(comparison: Comparison, group: Sequence[Change]) -> list[str]:
    """What the group's broken cases are attributed to, without repeats."""
    found = (comparison.attribution.get(change.case_id, "") for change in group)
    return list(dict.fromkeys(blame for blame in found if blame))


def to_markdown(comparison: Comparison) -> str:
    """The comparison for a CI job's summary."""
    word = "❌" if comparison.exit else "✅"
    lines = [f"## {word} {escape(comparison.verdict, 600)}", ""]
    lines += [f"> {escape(note)}" for note in comparison.notes]
    for name, (mark, heading) in SECTIONS.items():
        changes = comparison.sections.get(name, ())
        if not changes:
            continue
        is_open = " open" if name == "broken" else ""
        lines += ["", f"<details{is_open}><summary>{heading} ({len(changes)})</summary>", ""]
        for group in groups(comparison, name)[:GROUP_LIMIT]:
            lines += _markdown_group(comparison, mark, group)
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _markdown_group(comparison: Comparison, mark: str, group: tuple[Change, ...]) -> Iterator[str]:
    first = group[0]
    count = f" ({len(group)} cases)" if len(group) > 1 else ""
    arrow = f" {first.before or 'absent'} → {first.after}" if first.after else ""
    parts = [f"- **{escape(first.case_id)}**{count}{arrow}"]
    if first.text:
        parts.append(escape(first.text))
    if first.issue:
        parts.append(link(first.issue, first.issue))
    parts += [f"because of {escape(blame)}" for blame in blames(comparison, group)]
    yield " — ".join(parts)
    if mark == "!":
        rest = ", ".join(f"`{c.case_id}`" for c in group[1:TEXT_LIMIT] if c.check)
        if rest:
            yield f"  {rest}"


def to_json(comparison: Comparison) -> str:
    """The comparison as JSON, sorted and deterministic."""

    def side(report: object) -> dict[str, object]:
        names = ("implementation", "suite_version", "versions", "hardware", "matrix", "selection")
        return {name: getattr(report, name) for name in names}

    data = {
        "verdict": comparison.verdict,
        "exit": comparison.exit,
        "notes": comparison.notes,
        "before": side(comparison.before),
        "after": side(comparison.after),
        "sections": {
            name: [asdict(change) for change in changes]
            for name, changes in comparison.sections.items()
            if changes
        },
        "attribution": dict(comparison.attribution),
    }
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def to_html(comparison: Comparison) -> str:
    """The comparison as one self-contained page in the manner of the report's."""
    here = Path(__file__).parent
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            comparison=comparison,
            sections=SECTIONS,
            groups=groups,
            blames=blames,
            style=Markup((here / "page.css").read_text(encoding="utf-8")),
        )
    )


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "json": to_json,
    "html": to_html,
}
