"""Small adapters for the suite's own tests: sane, lying, with stale or passing expectations."""

from __future__ import annotations

from typing import Any

from conformance.expectation import Expectation
from conformance.implementation import Capability


class Planner:
    """Claims to plan, and nothing else."""

    name = "planner"
    capabilities = (Capability("plan"),)
    expectations: tuple[Expectation, ...] = ()

    def plan(self, config: Any, setting: Any, strategy: str, **options: Any) -> Any:
        """No plan at all."""
        raise NotImplementedError("this planner has no plan")


class Liar:
    """Claims a loss and has none."""

    name = "liar"
    capabilities = (Capability("loss"),)


class Stale(Planner):
    """Expects a failure of a check that does not exist."""

    expectations = (Expectation("Z99/*", "nothing fails there", "https://example.org/1"),)


class Hopeful(Planner):
    """Expects the suite's own data to be wrong, which it is not."""

    expectations = (Expectation("X12/mixtral/*", "is expected to fail", "https://example.org/2"),)


PLANNER, LIAR, STALE, HOPEFUL, NOT_ONE = Planner(), Liar(), Stale(), Hopeful(), object()
