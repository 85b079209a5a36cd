"""The matrix: which cases a check is asked over (a pure function of data, no torch).

Every check runs on every model that has its traits in its own settings. The rest is a covering
array for each family: each pair of values of two dimensions of `settings.DIMENSIONS`, and of a
dimension and a model, occurs in at least one row. A full product would be 60,000 cases and more.

A pair of a setting and a model is asked once, by the check that would see it break: N01 compares
every value of every dimension on every model with training without it. So M01 and X07 hold pairs of
values without the model (`Check.pairs_over`; M05 and O01 see on every model that layers are run
again and tensors leave), and a check some of whose own settings add what changes nothing by N01 to
what it asks of every model deals these over the models (`Check.dealt`). The full matrix asks all of
it of every model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import cache
from itertools import combinations, product

from conformance.case import Case, Check, Model
from conformance.families import MODELS
from conformance.settings import DIMENSIONS, Setting
from conformance.strategies import STRATEGIES, Strategy

Row = tuple[str, Setting]  # a model's name and a setting

# Delicate combinations that history names, asked wherever they apply, besides the pairs; in a
# family of more than two models each of one in turn, from the third on, which shares keys and
# values in gemma4 (M05, S01 and O01 deal them too; the full matrix asks them of every model).
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
    dimensions: tuple[str, ...],
    family: tuple[Model, ...],
    full: bool = False,
    by_model: bool = True,
) -> dict[str, tuple[Setting, ...]]:
    """Settings for each model of a family, by name, greedily and deterministically.

    Every pair of values of two dimensions, and of a dimension and a model, occurs in the family;
    each model has the default setting, and those of `BY_HAND` as said there.
    by_model: False for pairs of two dimensions only, and the default setting.
    full: the whole product instead.
    """
    names = tuple(name for name in DIMENSIONS if name in dimensions)
    candidates = [
        (model.name, setting)
        for values in product(*(DIMENSIONS[name] for name in names))
        for model in family
        if coherent(setting := Setting(**dict(zip(names, values, strict=True))))
        and setting.applies_to(model.traits)
    ]
    rows = candidates
    if not full and len(names) > 1:
        asked = [row for row in candidates if row[1] == Setting()]
        if by_model:
            asked += _by_hand(candidates)
        rows = [*asked, *_cover(candidates, asked, names, by_model)]
    return {m.name: tuple(s for name, s in rows if name == m.name) for m in family}


def _by_hand(candidates: Sequence[Row]) -> Iterator[Row]:
    """The rows of `BY_HAND`."""
    many = len({name for name, _ in candidates}) > 2
    for number, text in enumerate(BY_HAND, start=2):
        setting = Setting.parse(text)
        able = [row for row in candidates if row[1] == setting]
        yield from [able[number % len(able)]] if many and able else able


def _cover(
    candidates: Sequence[Row], given: Sequence[Row], names: Sequence[str], by_model: bool
) -> list[Row]:
    """Rows that, with the given ones, hold every pair: for the first pair that is missing, the
    candidate that holds most of the missing ones, of the model with the fewest rows so far."""
    pairs = {row: frozenset(_pairs(row, names, by_model)) for row in candidates}
    holders: dict[Hashable, list[Row]] = {}
    for row in candidates:
        for pair in pairs[row]:
            holders.setdefault(pair, []).append(row)
    missing = dict.fromkeys(pair for row in candidates for pair in _pairs(row, names, by_model))
    chosen: list[Row] = []
    taken = Counter[str]()
    for row in given:
        for pair in pairs[row]:
            missing.pop(pair, None)
    while missing:
        best = max(
            holders[next(iter(missing))],
            key=lambda row: (
                len(pairs[row] & missing.keys()),
                -taken[row[0]] if not by_model else 0,
            ),
        )
        taken[best[0]] += 1
        for pair in pairs[best]:
            missing.pop(pair, None)
        chosen.append(best)
    return chosen


def _pairs(row: Row, names: Sequence[str], by_model: bool) -> Iterator[Hashable]:
    model, setting = row
    values = [(name, getattr(setting, name)) for name in names]
    yield from combinations([("model", model), *values] if by_model else values, 2)


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
    family = tuple(m for m in MODELS.values() if m.family == model.family and check.asks(m))
    asked += [setting for setting, who in _deal(check, family) if full or who is model]
    if check.varies:
        if check.pairs_over == "all":
            family = tuple(m for m in MODELS.values() if check.asks(m))
        by_model = check.pairs_over == "model"
        asked += covering_settings(check.varies, family, full, by_model)[model.name]
    settings = [s for s in dict.fromkeys(asked) if s.applies_to(model.traits)]
    strategies = [
        STRATEGIES[name] for name in check.strategies if STRATEGIES[name].applies_to(model.traits)
    ]
    if check.one_a_family and not full:
        strategies = [t for t in strategies if _first_of_family(check, model.family, t) is model]
    if check.lone_rank:
        strategies = [strategy.on_one_rank() for strategy in strategies]
    if len(strategies) == 1 or len(settings) == 1 or full:
        return [Case(check, model, s, t) for t in strategies for s in settings]
    return [Case(check, model, s, t) for s, t in _spread(settings, strategies, len(check.settings))]


def _first_of_family(check: Check, family: str, strategy: Strategy) -> Model:
    """The first model of a family that a check asks and that can be spread so."""
    members = (m for m in MODELS.values() if m.family == family and check.asks(m))
    return next(m for m in members if strategy.applies_to(m.traits))


def _deal(check: Check, family: Sequence[Model]) -> Iterator[tuple[Setting, Model]]:
    """Each dealt setting with a model of the family that it applies to; checks begin apart."""
    for number, text in enumerate(check.dealt, start=sum(map(ord, check.id))):
        setting = Setting.parse(text)
        able = [m for m in family if setting.applies_to(m.traits)]
        if able:
            yield setting, able[number % len(able)]


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
