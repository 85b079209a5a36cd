"""Expected changes: what upstream announced, read from a TOML file of annotations."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from conformance.errors import InputError
from conformance.json_schema import violation
from conformance.report import one_line

SHIPPED = Path(__file__).with_name("annotations.toml")
KINDS = ("broken", "fixed", "drift", "skipped", "gone")
_TEXT = {"type": "string", "minLength": 1, "maxLength": 2000}
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "change": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["package", "since", "cases", "kinds", "what", "thread"],
                "additionalProperties": False,
                "properties": {
                    "package": _TEXT,
                    "since": _TEXT,
                    "cases": {"type": "array", "items": _TEXT},
                    "kinds": {"type": "array", "items": {"enum": list(KINDS)}},
                    "what": _TEXT,
                    "thread": _TEXT,
                },
            },
        }
    },
}


@dataclass(frozen=True)
class ExpectedChange:
    """One announced change: expected for its cases when `package` crosses `since`."""

    package: str
    since: Version
    cases: tuple[str, ...]
    kinds: frozenset[str]
    what: str
    thread: str

    def explains(
        self, kind: str, case_id: str, before: Mapping[str, str], after: Mapping[str, str]
    ) -> bool:
        """Whether a change of this kind in this case, between these versions, is the announced one
        (in either direction: going back undoes it)."""
        if kind not in self.kinds or not any(fnmatchcase(case_id, glob) for glob in self.cases):
            return False
        try:
            old, new = Version(before[self.package]), Version(after[self.package])
        except (KeyError, InvalidVersion):
            return False
        return (old < self.since) != (new < self.since)


def read_annotations(path: Path = SHIPPED) -> tuple[ExpectedChange, ...]:
    """The expected changes of a file. Raises InputError naming the file and the entry."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {one_line(str(error))}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {one_line(str(error))}") from error
    if fault := violation(data, _SCHEMA):
        raise InputError(one_line(f"{path}: {fault}"))
    return tuple(_entry(entry, path) for entry in data.get("change", ()))


def _entry(entry: Mapping[str, Any], path: Path) -> ExpectedChange:
    try:
        since = Version(entry["since"])
    except InvalidVersion as error:
        raise InputError(f"{path}: since: {one_line(str(error))}") from error
    return ExpectedChange(
        canonicalize_name(entry["package"]),
        since,
        tuple(entry["cases"]),
        frozenset(entry["kinds"]),
        one_line(entry["what"]),
        entry["thread"],
    )
