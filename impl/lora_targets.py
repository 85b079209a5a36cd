"""What a LoRA specification means on a given model: an explicit list, and what it leaves out.

PEFT adapts whatever carries a matching name. The same list means routed experts in one family, a
shared expert in the next and a dense MLP in a third (L5), reaches into towers (L6), and adapts
weights that the forward reads past (L7); none of it is said. Here every outcome is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import Refused
from .traits import ExpertFacts, Linear, Traits

if TYPE_CHECKING:
    from torch import nn

ROUTED_EXPERTS = "routed experts"
ALL_LINEAR = "all-linear"
BYPASSED = "the forward reads its weight directly in training, past the adapter"
WRAPPER = "_checkpoint_wrapped_module."
# The specification's regex after the path of the layers (families.md §6; dots unescaped there too).
SPECIFIED = r"(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
SPECIFIED_LEAVES = tuple(f"{leaf}_proj" for leaf in ("up", "down", "gate", "q", "k", "v", "o"))
# Leaf names by which some family calls its routed experts → the fused weight that holds them.
EXPERT_LEAVES = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "gate_up_proj": "gate_up_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "down_proj": "down_proj",
    "w2": "down_proj",
}
_BLOCKS = re.compile(r"attn|attention|mlp|feed_forward|ffn|shared_expert")
_BARE = ("fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True)
class Targets:
    """modules: full names of the linear layers to adapt, as PEFT must be given them. parameters:
    full names of 3-D expert weights. excluded: a name (or a pattern of names) → why it is left out.
    warnings: where the outcome is not what the words of the specification suggest."""

    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    excluded: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def exclusion(linear: Linear, traits: Traits) -> str:
    """Why the default LoRA leaves a linear layer of the decoder out ("": it is adapted)."""
    name, experts, cls = linear.name, traits.experts, traits.cls
    block, _, leaf = name.rpartition(".")
    if any(name.endswith(part) for part in traits.bypassed):
        return BYPASSED
    if experts and experts.router and (name == experts.router or block == experts.router):
        return "the router: adapting it changes which experts are trained"
    if experts and experts.path and name.startswith(f"{experts.path}."):
        return f"routed experts: ask for {ROUTED_EXPERTS!r}"
    if linear.outputs == 1:
        return "a gate with one output"
    heads = cls.recurrent_heads if cls else 0
    if cls and cls.recurrent_path and block == cls.recurrent_path:
        few = heads and linear.outputs <= 2 * heads
        return "one or two outputs a head (decay and step size)" if few else ""
    if _BLOCKS.search(block) or (not block and leaf in _BARE):
        return ""
    return "no attention, MLP or recurrent projection; left out by the specification's regex too"


def default_regex(traits: Traits) -> tuple[str, dict[str, str]]:
    """The PEFT regex (full match) for the language model of the class that is loaded, and what it
    leaves out with the reason.

    Exactly the specification's where the model has only those projections; otherwise the same form
    over the projections that the model has. Without a class: the specification's form on
    `model.layers`.
    """
    head = rf"{traits.layers}.[\d]+.({WRAPPER})?"
    if traits.cls is None:
        return head + SPECIFIED, {}
    reasons = {linear.name: exclusion(linear, traits) for linear in traits.cls.linears}
    chosen = [name for name, reason in reasons.items() if not reason]
    excluded = {name: reason for name, reason in reasons.items() if reason}
    for name in traits.cls.model_linears:
        excluded[name] = "outside the decoder layers; left out by the specification's regex too"
    if not chosen:
        raise Refused(f"LoRA: {traits.model_type} has no linear layer to adapt by name")
    specified = all(
        name.rpartition(".")[0] in ("mlp", "self_attn")
        and name.rpartition(".")[2] in SPECIFIED_LEAVES
        for name in chosen
    )
    return head + (SPECIFIED if specified else _alternatives(chosen)), excluded


def names_regex(words: list[str], traits: Traits, towers: bool) -> tuple[str | None, Targets]:
    """A list of names (or "all-linear") as a PEFT regex over the language model, or None when it
    names no linear layer; beside it the routed experts that are meant, what is left out, and the
    warnings. With `towers` the names count everywhere, wrappers included (`q_proj.linear`).

    Raises Refused when nothing is named that the model has.
    """
    if traits.cls is None:
        raise Refused("LoRA: the class is unknown, and so are its modules; give a regex")
    names = [word for word in words if word != ROUTED_EXPERTS]
    chosen, outside, excluded = _named(names, traits)
    taken = {name.rpartition(".")[2] for name in chosen}
    leaves = {n.rpartition(".")[2] for n in names} & set(EXPERT_LEAVES)
    experts, warnings, parameters = traits.experts, [], []
    if ROUTED_EXPERTS in words:
        if experts is None:
            raise Refused(f"LoRA: {ROUTED_EXPERTS!r} was asked for, but the model has no experts")
        parameters = list(experts.targets)
    elif experts and leaves & taken:
        warnings.append(_stray_leaves(leaves & taken, chosen))
    elif experts and leaves:
        meant = {EXPERT_LEAVES[leaf] for leaf in leaves}
        parameters = [t for t in experts.targets if t.rpartition(".")[2] in meant]
    elif experts and ALL_LINEAR in names:
        warnings.append(_ALL_LINEAR_WARNING)
    if not chosen and not outside and not parameters:
        raise Refused(
            f"LoRA: {', '.join(words)} names no module of {traits.cls.name}, whose layers are"
            f" {traits.layers}.* with {', '.join(n.name for n in traits.cls.linears)}"
        )
    head = rf"{re.escape(traits.layers)}\.\d+\.({WRAPPER})?"
    parts = [head + _alternatives(chosen)] if chosen else []
    parts += [re.escape(name) for name in outside]
    if towers and names and ALL_LINEAR not in names:
        tower = "|".join(traits.components)
        parts.append(rf"(.*\.)?({tower})\..*({'|'.join(map(re.escape, names))})(\.linear)?")
    regex = "|".join(parts) if parts else None
    return regex, Targets((), tuple(parameters), excluded, tuple(warnings))


_ALL_LINEAR_WARNING = (
    f"'{ALL_LINEAR}' adapts linear layers only, so no routed expert; add {ROUTED_EXPERTS!r}"
)


def _stray_leaves(leaves: Iterable[str], chosen: Iterable[str]) -> str:
    where = sorted({n.rpartition(".")[0] for n in chosen if n.rpartition(".")[2] in leaves})
    return (
        f"{', '.join(sorted(leaves))} adapts {', '.join(where)}, and no routed expert; add"
        f" {ROUTED_EXPERTS!r} to adapt the experts"
    )


def _named(names: list[str], traits: Traits) -> tuple[list[str], list[str], dict[str, str]]:
    """Decoder linear layers that are named, linear layers of the language model outside the decoder
    layers that are, and those named but left out."""
    assert traits.cls is not None
    chosen: list[str] = []
    excluded: dict[str, str] = {}
    everything = ALL_LINEAR in names
    for linear in traits.cls.linears:
        full = f"{traits.layers}.0.{linear.name}"
        if not everything and not any(_ends(full, name) for name in names):
            continue
        if any(linear.name.endswith(part) for part in traits.bypassed):
            excluded[linear.name] = BYPASSED
        elif traits.experts and linear.name.startswith(f"{traits.experts.path}."):
            excluded[linear.name] = f"routed experts: ask for {ROUTED_EXPERTS!r}"
        else:
            chosen.append(linear.name)
    outside = [
        name
        for name in traits.cls.model_linears
        if everything or any(_ends(name, wanted) for wanted in names)
    ]
    return chosen, outside, excluded


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _alternatives(names: Iterable[str]) -> str:
    blocks: dict[str, list[str]] = {}
    for name in names:
        block, _, leaf = name.rpartition(".")
        blocks.setdefault(block, []).append(leaf)
    parts = [
        f"{block}.({'|'.join(leaves)})" if block else f"({'|'.join(leaves)})"
        for block, leaves in blocks.items()
    ]
    return f"({'|'.join(parts)})"


def resolve(
    spec: str | Iterable[str],
    model: nn.Module,
    traits: Traits | None = None,
    towers: bool = False,
) -> Targets:
    """The explicit targets of a LoRA specification on a model (a meta-device one will do).

    spec: a PEFT regex, "all-linear", "routed experts", or a list of names and suffixes that may
    hold "routed experts". Everything is restricted to the language model unless `towers`, where
    linear wrappers that PEFT does not know are redirected to the linear layer inside (L6). Weights
    that the forward reads past are excluded. Raises Refused when nothing is left to adapt.
    """
    if traits is None:
        from .detect import detect

        traits = detect(getattr(model, "config", None))
    words = [spec] if isinstance(spec, str) else list(spec)
    parameters = list(_routed(model, traits)) if ROUTED_EXPERTS in words else []
    names = [word for word in words if word != ROUTED_EXPERTS]
    found, excluded = _modules(names, isinstance(spec, str), model, traits, towers)
    warnings: list[str] = []
    if traits.experts is not None and not isinstance(spec, str) and not parameters:
        parameters += _by_leaf(names, found, model, traits, warnings)
    if traits.experts is not None and ALL_LINEAR in names and not parameters:
        warnings.append(_ALL_LINEAR_WARNING)
    if ROUTED_EXPERTS in words and traits.experts and traits.experts.layout == "modules":
        found += _expert_modules(model, traits.experts)
    if not found and not parameters:
        raise Refused(
            f"LoRA: {spec!r} matches nothing in {type(model).__name__}, whose layers are"
            f" {traits.layers}.*; the module names differ from class to class"
        )
    return Targets(tuple(found), tuple(parameters), excluded, tuple(warnings))


def _modules(
    names: list[str], is_regex: bool, model: nn.Module, traits: Traits, towers: bool
) -> tuple[list[str], dict[str, str]]:
    found: list[str] = []
    excluded: dict[str, str] = {}
    for name, module in model.named_modules():
        plain = name.replace(WRAPPER, "")
        if not _is_linear(module) or not _matches(names, is_regex, name, module, model):
            continue
        reason = _barred(plain, traits, towers)
        if reason:
            excluded[re.sub(r"\.\d+(?=\.)", ".*", plain)] = reason
        else:
            found.append(name)
    return found, excluded


def _is_linear(module: nn.Module) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _matches(
    names: list[str], is_regex: bool, name: str, module: nn.Module, model: nn.Module
) -> bool:
    """Whether the specification names a linear layer; a wrapper's name means the layer inside
    it.
    """
    if ALL_LINEAR in names:
        find = getattr(model, "get_output_embeddings", None)
        return not (find and find() is module)
    spellings = {name, name.replace(WRAPPER, "")}
    spellings |= {s.removesuffix(".linear") for s in set(spellings)}
    if is_regex:
        return any(re.fullmatch(pattern, s) for pattern in names for s in spellings)
    return any(s == n or s.endswith(f".{n}") for n in names for s in spellings)


def _barred(name: str, traits: Traits, towers: bool) -> str:
    parts = set(name.split("."))
    tower = parts & set(traits.components)
    if tower and not towers:
        return f"in {'.'.join(sorted(tower))}: no gradient on text batches; ask for towers"
    if any(name.endswith(part) for part in traits.bypassed):
        return BYPASSED
    return ""


def _routed(model: nn.Module, traits: Traits) -> Iterable[str]:
    """Full names of the fused expert weights; none where every expert is a module of its own."""
    experts = traits.experts
    if experts is None:
        raise Refused(f"LoRA: {ROUTED_EXPERTS!r} was asked for, but the model has no experts")
    wanted = {f"{experts.path}.{name}" for name in experts.parameters}
    for name, _ in model.named_parameters():
        plain = name.replace(WRAPPER, "")
        if plain.startswith(f"{traits.layers}.") and any(plain.endswith(f".{w}") for w in wanted):
            yield name


def _expert_modules(model: nn.Module, experts: ExpertFacts) -> list[str]:
    inside = f".{experts.path}."
    return [n for n, m in model.named_modules() if inside in f".{n}" and _is_linear(m)]


def _by_leaf(
    names: list[str], found: list[str], model: nn.Module, traits: Traits, warnings: list[str]
) -> list[str]:
    """Expert weights meant by leaf names such as `w1` where no linear layer has that name; a
    warning where one has, since then the routed experts stay frozen."""
    leaves = [n.rpartition(".")[2] for n in names if n.rpartition(".")[2] in EXPERT_LEAVES]
    taken = {leaf for leaf in leaves if any(f.rpartition(".")[2] == leaf for f in found)}
    meant = {EXPERT_LEAVES[leaf] for leaf in leaves if leaf not in taken}
    if taken:
        inside = (re.sub(r".*[.][0-9]+[.]", "", name) for name in found)
        warnings.append(_stray_leaves(taken, inside))
    if not meant or taken:
        return []
    return [n for n in _routed(model, traits) if n.rpartition(".")[2] in meant]
