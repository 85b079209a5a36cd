"""Expectations: the known failures of one implementation, matched strictly.

An expectation that matches no case inside its version range, or whose case passes, is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import InvalidRequirement, Requirement


@dataclass(frozen=True)
class Expectation:
    """Cases that are known to fail, and how.

    pattern: shell-style, over case ids (`M05/gemma4-e2b/*ckpt-reentrant*/*`).
    raises: the exception types; AssertionError for a wrong number. A failure of another type is a
        failure.
    when: requirements that must all hold, such as `transformers>=5.6,<5.30`; empty: always.
    """

    pattern: str
    reason: str
    issue: str
    raises: tuple[type[BaseException], ...] = (AssertionError,)
    when: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("pattern", "reason", "issue"):
            if not str(getattr(self, name)).strip():
                raise ValueError(f"expectation {self.pattern!r}: {name} is empty")
        if not self.raises:
            raise ValueError(f"expectation {self.pattern!r}: `raises` is empty")
        for text in self.when:
            try:
                Requirement(text)
            except InvalidRequirement as error:
                raise ValueError(f"expectation {self.pattern!r}: when {text!r}: {error}") from error

    def matches(self, case_id: str) -> bool:
        """Whether a case is one of the known failures (versions apart)."""
        return fnmatchcase(case_id, self.pattern)

    def applies(self) -> bool:
        """Whether the installed versions lie in the range."""
        return all(_holds(Requirement(text)) for text in self.when)


def _holds(requirement: Requirement) -> bool:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return False
    return requirement.specifier.contains(installed, prereleases=True)


def expected(case_id: str, expectations: Iterable[Expectation]) -> Expectation | None:
    """The first expectation that matches the case and applies to the installed versions."""
    return next((e for e in expectations if e.matches(case_id) and e.applies()), None)


def stale(case_ids: Sequence[str], expectations: Iterable[Expectation]) -> list[Expectation]:
    """Expectations whose version range holds and that match no case."""
    return [
        e
        for e in expectations
        if e.applies() and not any(e.matches(case_id) for case_id in case_ids)
    ]
