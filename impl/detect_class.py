"""Facts that only the class that is loaded can tell, read from an instance on the meta device.

An instance of the real size costs some hundredths of a second and no memory, since no weight
exists.
"""

from __future__ import annotations

import copy
import dis
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from .detect_config import one_line
from .errors import ConfigError
from .traits import ClassFacts, ExpertFacts, Linear

# The auto class by whose mapping a model type is loaded, in the order in which they are asked.
AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForCausalLM",
)
EXPERT_WEIGHTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def auto_class_for(config: Any) -> str | None:
    """The auto class that loads a config (classes that the user registered included), or None when
    transformers has no language model for it."""
    for auto_class in AUTO_CLASSES:
        if loads(auto_class, config):
            return auto_class
    return None


def loads(auto_class: str, config: Any) -> bool:
    """Whether an auto class has a model for a config; False for what is no auto class here."""
    mapping = getattr(getattr(transformers, auto_class, None), "_model_mapping", ())
    return type(config) in mapping


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its remarks on configs (they would be the only output of a plan)."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def meta_model(config: Any, auto_class: str) -> nn.Module:
    """The model of a config on the meta device: every module and shape, no weight.

    Raises whatever the constructor raises (ImportError when a tower needs an absent library).
    """
    loader = getattr(transformers, auto_class)
    with _quiet(), torch.device("meta"):
        return cast(nn.Module, loader.from_config(copy.deepcopy(config), trust_remote_code=False))


def class_facts(config: Any, auto_class: str, layers: int) -> tuple[ClassFacts, str]:
    """The facts of the class that `auto_class` gives for a config with `layers` decoder layers, and
    a note ("" when there is nothing to say).

    When a tower needs a library that is not installed, the text part alone is built, the paths are
    those of a multimodal wrapper, and the note says so. Raises ConfigError, one line, when the
    sizes do not fit together.
    """
    try:
        return _facts(meta_model(config, auto_class), auto_class, layers), ""
    except ImportError as error:
        missing = one_line(str(error).strip().partition("\n")[0], 120)
    except Exception as error:
        raise ConfigError(
            f"{config.model_type}: {auto_class} cannot build this config: {one_line(error)}"
        ) from None
    text = config.get_text_config()
    inner = auto_class_for(text)
    if text is config or inner is None:
        raise ConfigError(f"{config.model_type}: {auto_class} cannot build it here: {missing}")
    try:
        facts = _facts(meta_model(text, inner), inner, layers)
    except Exception as error:
        raise ConfigError(f"{text.model_type}: cannot be built: {one_line(error)}") from None
    return _as_wrapper(facts, config, auto_class), (
        f"the towers could not be built ({missing}); the facts are those of the text part"
    )


def _as_wrapper(facts: ClassFacts, config: Any, auto_class: str) -> ClassFacts:
    """Text facts restated for the multimodal class around it, as its source names the parts."""
    cls = getattr(transformers, auto_class)._model_mapping[type(config)]
    tied = getattr(cls, "_tied_weights_keys", None)
    target = next(iter(tied.values()), "") if isinstance(tied, dict) else ""
    prefix = target.rpartition(".embed_tokens")[0] or "model.language_model"
    leaf = facts.layers.rpartition(".")[2]
    inner = facts.layers.rpartition(".")[0]
    return replace(
        facts,
        name=cls.__name__,
        auto_class=auto_class,
        layers=f"{prefix}.{leaf}",
        model_linears=tuple(n.replace(inner, prefix, 1) for n in facts.model_linears),
        forward=frozenset(inspect.signature(cls.forward).parameters),
        reads_type_ids=_reads(_inner_class(config, cls), "token_type_ids"),
        accepts_loss_kwargs=getattr(cls, "accepts_loss_kwargs", None),
        components=("vision_tower", "audio_tower", "embed_vision", "embed_audio"),
        no_split=tuple(sorted(getattr(cls, "_no_split_modules", None) or ())),
        complete=False,
    )


def _inner_class(config: Any, cls: type[nn.Module]) -> type[nn.Module]:
    found = transformers.MODEL_MAPPING.get(type(config), cls)
    return cast("type[nn.Module]", found[0] if isinstance(found, tuple) else found)


def _reads(cls: type[nn.Module], argument: str) -> bool:
    """Whether `forward` does anything with an argument (gemma3n accepts type ids and ignores
    them).
    """
    code = dis.get_instructions(inspect.unwrap(cls.forward))
    return any(step.argval == argument and "LOAD" in step.opname for step in code)


def _facts(model: Any, auto_class: str, layers: int) -> ClassFacts:
    path, stack = find_layers(model, layers)
    numels = [sum(p.numel() for p in layer.parameters()) for layer in stack]
    head = _head(model)
    keyed = [i for i, layer in enumerate(stack) if _has(layer, "k_proj")]
    queried = [i for i, layer in enumerate(stack) if _has(layer, "q_proj")]
    recurrent, recurrent_path, state = _recurrent(stack)
    components = _components(model, path)
    return ClassFacts(
        name=type(model).__name__,
        auto_class=auto_class,
        layers=path,
        layer_classes=tuple(dict.fromkeys(type(layer).__name__ for layer in stack)),
        components=components,
        linears=_linears(stack),
        model_linears=_model_linears(model, path),
        wrapped=_wrapped(model, components),
        forward=frozenset(inspect.signature(model.forward).parameters),
        reads_type_ids=_reads(
            type(getattr(model, model.base_model_prefix, model)), "token_type_ids"
        ),
        lm_head=isinstance(head, nn.Linear) and head.bias is None,
        tied=head is not None and getattr(head, "weight", None) is _embedding_weight(model),
        accepts_loss_kwargs=getattr(model, "accepts_loss_kwargs", None),
        tp_plan=tuple(getattr(model, "_tp_plan", None) or ()),
        rowwise=_rowwise(getattr(model, "_tp_plan", None) or {}),
        ep_plan=tuple(getattr(model, "_ep_plan", None) or getattr(model, "ep_plan", None) or ()),
        no_split=tuple(sorted(getattr(model, "_no_split_modules", None) or ())),
        attention=_attention(model),
        recurrent=recurrent,
        recurrent_path=recurrent_path,
        delta_rule=_is_delta_rule(state),
        recurrent_heads=_decay_heads(state),
        keyless=tuple(i for i in queried if keyed and i not in keyed),
        experts=_experts(stack),
        numel=sum(p.numel() for p in model.parameters()),
        layer_numel=max(numels),
    )


def _rowwise(plan: Mapping[str, str]) -> tuple[str, ...]:
    """Leaf names of the plan's modules that are sharded by their input."""
    return tuple(sorted({k.rpartition(".")[2] for k, style in plan.items() if style == "rowwise"}))


def find_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder layers: the module list of `count` items beside the
    input embedding, otherwise the largest one of that length. ConfigError if there is none."""
    every = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    lists = {name: module for name, module in every.items() if len(module) == count}
    if not lists:  # a config may count sublayers: then any list of checkpointed layers will do
        lists = {name: module for name, module in every.items() if _checkpointed(module)}
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no list of {count} decoder layers")
    embedding = _embedding(model)
    where = next((n for n, m in model.named_modules() if m is embedding), "")
    parent = where.rpartition(".")[0]
    beside = [name for name in lists if name.rpartition(".")[0] == parent]
    chosen = beside or list(lists)
    name = max(chosen, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    return name, lists[name]


def _checkpointed(stack: nn.ModuleList) -> bool:
    """Whether a list holds layers that transformers would recompute."""
    return all(hasattr(layer, "gradient_checkpointing") for layer in stack)


def _embedding(model: nn.Module) -> nn.Module | None:
    try:
        return cast("nn.Module | None", cast(Any, model).get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return None


def _embedding_weight(model: nn.Module) -> Any:
    return getattr(_embedding(model), "weight", object())


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return cast("nn.Module | None", find()) if find else None


def _has(layer: nn.Module, leaf: str) -> bool:
    return any(name.rpartition(".")[2] == leaf for name, _ in layer.named_modules())


def _recurrent(stack: nn.ModuleList) -> tuple[tuple[int, ...], str, nn.Module | None]:
    """Layers that carry a state along the sequence (a convolution or a decay), and the module of
    the first one that does, with its path in the layer."""
    found, where, state = [], "", None
    for index, layer in enumerate(stack):
        convolutions = [n for n, m in layer.named_modules() if isinstance(m, nn.Conv1d)]
        decays = [n for n, _ in layer.named_parameters() if n.rpartition(".")[2] == "A_log"]
        if convolutions or decays:
            found.append(index)
            if state is None:
                where = (convolutions or decays)[0].rpartition(".")[0]
                state = layer.get_submodule(where)
    return tuple(found), where, state


def _is_delta_rule(state: nn.Module | None) -> bool:
    """Whether the modelling file of a recurrent module computes a gated delta rule."""
    modelling = sys.modules.get(type(state).__module__)
    return state is not None and hasattr(modelling, "torch_chunk_gated_delta_rule")


def _decay_heads(state: nn.Module | None) -> int:
    decay = getattr(state, "A_log", None)
    return int(decay.shape[0]) if isinstance(decay, nn.Parameter) and decay.ndim == 1 else 0


def _components(model: nn.Module, path: str) -> tuple[str, ...]:
    """Names of the modules beside the path to the language model that hold parameters."""
    found: list[str] = []
    head = _head(model)
    parts = path.split(".")[:-2]  # above the module that holds the layers
    for depth in range(len(parts) + 1):
        parent = model.get_submodule(".".join(parts[:depth]))
        for name, child in parent.named_children():
            on_path = path.startswith(".".join([*parts[:depth], name]) + ".")
            if not on_path and child is not head and any(True for _ in child.parameters()):
                found.append(name)
    return tuple(dict.fromkeys(found))


def _linears(stack: nn.ModuleList) -> tuple[Linear, ...]:
    found: dict[str, Linear] = {}
    for layer in stack:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                inputs, outputs = _sizes(module)
                old = found.get(name, Linear(name, 0, 0, 0))
                found[name] = Linear(
                    name, max(old.inputs, inputs), max(old.outputs, outputs), old.count + 1
                )
    return tuple(found.values())


def _sizes(module: nn.Linear | Conv1D) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(module.nx), int(module.nf)


def _model_linears(model: nn.Module, path: str) -> tuple[str, ...]:
    owner = path.rpartition(".")[0]
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(f"{owner}.")
        and not name.startswith(f"{path}.")
    )


def _wrapped(model: nn.Module, components: tuple[str, ...]) -> tuple[str, ...]:
    """Classes in the towers that are no linear layer but hold exactly one, named `linear`."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        inside = set(name.split(".")) & set(components)
        if inside and list(children) == ["linear"] and isinstance(children["linear"], nn.Linear):
            found[type(module).__name__] = None
    return tuple(found)


def _attention(model: nn.Module) -> tuple[str, ...]:
    flags = {
        "sdpa": "_supports_sdpa",
        "flash_attention_2": "_supports_flash_attn",
        "flex_attention": "_supports_flex_attn",
    }
    return (*(name for name, flag in flags.items() if getattr(model, flag, False)), "eager")


def _experts(stack: nn.ModuleList) -> ExpertFacts | None:
    """The routed experts as they are built: the layers that have them, path, weights, layout."""
    found: ExpertFacts | None = None
    layers: list[int] = []
    for index, layer in enumerate(stack):
        for name, module in layer.named_modules():
            facts = _expert_module(name, module)
            if facts:
                layers.append(index)
                found = found or replace(facts, **_surroundings(layer, name))
                break
    return replace(found, layers=tuple(layers)) if found else None


def _expert_module(name: str, module: nn.Module) -> ExpertFacts | None:
    weights = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
    names = tuple(n for n in EXPERT_WEIGHTS if n in weights)
    if len(names) >= 2:
        return _fused(name, module, {n: weights[n] for n in names})
    is_list = isinstance(module, nn.ModuleList) and len(module) > 1
    if is_list and name.rpartition(".")[2] in ("experts", "local_experts"):
        return ExpertFacts(
            num=len(cast(nn.ModuleList, module)), top_k=1, path=name, layout="modules"
        )
    return None


def _fused(name: str, module: nn.Module, weights: Mapping[str, nn.Parameter]) -> ExpertFacts:
    down = weights.get("down_proj", list(weights.values())[-1])
    up = next(iter(weights.values()))
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:  # (E, rows, H) unless only the other axis can be H
        transposed = up.shape[2] != down.shape[1] and up.shape[1] == down.shape[2]
    activation = getattr(module, "act_fn", None)
    return ExpertFacts(
        num=int(up.shape[0]),
        top_k=1,
        width=int(down.shape[1] if transposed else down.shape[2]),
        path=name,
        parameters=tuple(weights),
        layout="transposed" if transposed else "fused",
        interleaved=not getattr(module, "is_concatenated", True),
        bias=any(n.endswith("bias") for n, _ in module.named_parameters(recurse=False)),
        gated=bool(getattr(module, "has_gate", "gate_up_proj" in weights or len(weights) == 3)),
        activation=type(activation).__name__ if isinstance(activation, nn.Module) else "",
        obstacle=_kernel_obstacle(module),
    )


def _kernel_obstacle(module: nn.Module) -> str:
    """What the fused kernel itself says of an experts module (it probes the gate: L15)."""
    try:
        from .kernels.registration import why_unsupported
    except ImportError as error:
        return f"the kernel cannot be imported: {one_line(error, 120)}"
    return why_unsupported(module) or ""


def _surroundings(layer: nn.Module, path: str) -> dict[str, Any]:
    """Router, shared expert and placement of an experts module inside its layer."""
    block = path.rpartition(".")[0]
    inside = [n for n, _ in layer.named_modules() if n and n.rpartition(".")[0] == block]
    router = next((n for n in inside if n.rpartition(".")[2] in ("gate", "router", "wg")), "")
    shared = any(n.rpartition(".")[2].startswith("shared_expert") for n in inside)
    return {"router": router, "shared": shared, "in_layer": not block}
