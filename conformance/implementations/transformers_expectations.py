"""Known failures of the stock stack: each with its reason, its thread and its version range."""

from __future__ import annotations

from conformance.expectation import Expectation

EXPECTATIONS: tuple[Expectation, ...] = ()
