"""The forward's argument for keys and values of earlier tokens: `cache`, which transformers before
5.24 called `past_key_values`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values")


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's keyword arguments, by either name, or None."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the cache, by whichever name it has there, set to None."""
    return {name: None if name in NAMES else value for name, value in arguments.items()}
