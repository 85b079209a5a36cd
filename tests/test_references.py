"""What code cites can be found: files of facts, their sections, and live defects by number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conformance.catalogue import checks

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "docs" / "facts"
CITED = re.compile(r"\b(families|checks|live-defects|bugs|parallel|kernels)\.md(?:\s+§(\d+))?")
DEFECT = re.compile(r"\blive[- ]defects?(?:\.md)? (L\d+)\b")
FOLDERS = ("conformance", "impl", "tests", "ci", "fixtures")


def sources() -> list[tuple[str, str]]:
    """(path, text) of every Python file."""
    found = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
    return [(str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in found]


@pytest.mark.skipif(not FACTS.is_dir(), reason="unavailable: the documents are not in this copy")
def test_every_citation_leads_somewhere() -> None:
    sections = {
        page.stem: set(re.findall(r"^##+ (\d+)", page.read_text(encoding="utf-8"), re.M))
        for page in FACTS.glob("*.md")
    }
    known = set(re.findall(r"^\| (L\d+)", (FACTS / "live-defects.md").read_text("utf-8"), re.M))
    assert known, "live-defects.md lists no defect"
    count, lost = 0, []
    for path, text in sources():
        for name, section in CITED.findall(text):
            count += 1
            if name not in sections or (section and section not in sections[name]):
                lost.append(f"{path}: {name}.md §{section}")
        lost += [f"{path}: {number}" for number in DEFECT.findall(text) if number not in known]
    assert count > 50, "the pattern finds no citations"
    assert not lost, lost


BENCHMARKS = {"B01", "B02", "B05", "B06", "B07"}  # figures, never assertions (`bench_step`)


@pytest.mark.skipif(not FACTS.is_dir(), reason="unavailable: the documents are not in this copy")
def test_every_check_of_the_catalogue_is_there() -> None:
    text = (FACTS / "checks.md").read_text("utf-8")
    wanted = set(re.findall(r"^\| \*{0,2}([A-Z]\d\d)\b", text, re.M))
    assert len(wanted) > 100, "the pattern finds no catalogue"
    missing = wanted - set(checks()) - BENCHMARKS
    assert not missing, sorted(missing)
