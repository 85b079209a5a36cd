"""The matrix: which cases a check is asked over (a pure function of data, no torch).

Every check runs on every model that has its traits in its own settings. The rest is a covering
array: each pair of values of two dimensions of `settings.DIMENSIONS` (and, per model, of a
dimension and a strategy) occurs in at least one row. A full product would be 60,000 cases and more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, product

from conformance.case import Case, Check, Model
from conformance.families import MODELS
from conformance.settings import DIMENSIONS, Setting
from conformance.strategies import STRATEGIES, Strategy

# Delicate combinations that history names, asked wherever they apply, besides the pairs.
BY_HAND: tuple[str, ...] = (
    "lora+ckpt-reentrant",
    "lora+ckpt-nonreentrant+packed",
    "lora-experts+ckpt-nonreentrant",
    "lora-experts+ckpt-nonreentrant+kernels",
    "lora+ckpt-nonreentrant+images",
    "ckpt-nonreentrant+offload",
)


def coherent(setting: Setting) -> bool:
    """Whether the combination means anything: the modes that need checkpointing have it."""
    if setting.offload == "hidden_states" and setting.checkpointing == "off":
        return False
    return not (setting.tuning == "qlora" and setting.dtype == "float64")


@cache
def covering_settings(
    dimensions: tuple[str, ...], traits: frozenset[str], full: bool = False
) -> tuple[Setting, ...]:
    """Settings that cover every pair of values of the dimensions, greedily and deterministically.

    full: the whole product instead.
    """
    names = tuple(name for name in DIMENSIONS if name in dimensions)
    candidates = [
        setting
        for values in product(*(DIMENSIONS[name] for name in names))
        if coherent(setting := Setting(**dict(zip(names, values, strict=True))))
        and setting.applies_to(traits)
    ]
    if full or len(names) < 2:
        return tuple(candidates)
    pairs = {s: frozenset(_pairs(s, names)) for s in candidates}
    missing = set().union(*pairs.values()) if pairs else set()
    chosen: list[Setting] = []
    while missing:
        best = max(candidates, key=lambda s: len(pairs[s] & missing))
        missing -= pairs[best]
        chosen.append(best)
    by_hand = (Setting.parse(text) for text in BY_HAND)
    extra = [s for s in by_hand if s.applies_to(traits) and s.dimensions <= set(names)]
    return tuple(dict.fromkeys([*chosen, *extra]))


def _pairs(setting: Setting, names: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    for a, b in combinations(names, 2):
        yield a, getattr(setting, a), b, getattr(setting, b)


def cases(check: Check, matrix: str = "default") -> list[Case]:
    """Every case of a check in the named matrix (`default` or `full`), in a fixed order."""
    if check.nightly and matrix != "full":
        return []
    if not check.per_model:
        return [Case(check, None, Setting.parse(text)) for text in check.settings]
    return [
        case
        for model in MODELS.values()
        if check.asks(model)
        for case in _cases_of_model(check, model, full=matrix == "full")
    ]


def _cases_of_model(check: Check, model: Model, full: bool) -> list[Case]:
    asked = [Setting.parse(text) for text in check.settings]
    if check.varies:
        asked += covering_settings(check.varies, model.traits, full)
    settings = [s for s in dict.fromkeys(asked) if s.applies_to(model.traits)]
    strategies = [
        STRATEGIES[name] for name in check.strategies if STRATEGIES[name].applies_to(model.traits)
    ]
    if len(strategies) == 1 or len(settings) == 1 or full:
        return [Case(check, model, s, t) for t in strategies for s in settings]
    return [Case(check, model, s, t) for s, t in _spread(settings, strategies, len(check.settings))]


def _spread(
    settings: Sequence[Setting], strategies: Sequence[Strategy], own: int
) -> list[tuple[Setting, Strategy]]:
    """Each own setting with each strategy; the array's rows dealt over the strategies in turn, so
    that across models each (setting, strategy) pair is met.
    """
    rows: list[tuple[Setting, Strategy]] = [(s, t) for t in strategies for s in settings[:own]]
    for index, setting in enumerate(settings[own:]):
        rows.append((setting, strategies[index % len(strategies)]))
    return rows
