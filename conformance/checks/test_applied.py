"""What is planned is applied, to every layer that it is for; what cannot be is announced."""

from __future__ import annotations

import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from conformance.applied import (
    Calls,
    Place,
    counted,
    counted_experts,
    places,
    registered,
    replaced,
)
from conformance.case import Case
from conformance.check import check
from conformance.checks.probes import (
    Batch,
    Measured,
    experts_of,
    labelled,
    layer_types,
    layers_of,
    text_config,
    unwrapped,
)
from conformance.settings import Setting
from conformance.storage_watch import StorageWatch
from conformance.subject import Subject


class Seen(NamedTuple):
    """What a step showed. logits: whether autograd kept those of all labelled tokens. runs,
    experts: calls of experts modules and of their implementation, by the module's id."""

    calls: Calls
    logits: bool
    runs: Counter[int]
    experts: Counter[int]


def step(subject: Subject, model: nn.Module, put: Sequence[Place], name: str | None) -> Seen:
    """A forward and backward of the case's batch in training mode, watched."""
    batch, runs = subject.batch(), Counter[int]()
    layers = layers_of(model, subject.model_spec)
    with (
        counted(put, layers) as calls,
        counted_experts(name) as experts,
        kept_logits(model, batch) as kept,
        ExitStack() as hooks,
    ):
        for module in experts_of(model).values():
            handle = module.register_forward_pre_hook(lambda m, _: runs.update([id(m)]))
            hooks.callback(handle.remove)
        subject.loss(model.train(), batch).backward()
    return Seen(calls, bool(kept), runs, experts)


@contextmanager
def kept_logits(model: nn.Module, batch: Batch) -> Iterator[list[int]]:
    """Rows of what autograd saves that is as wide as the vocabulary and has a row a label."""
    width, rows = int(text_config(model).vocab_size), labelled(batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.dim() > 1 and tensor.shape[-1] == width and tensor.is_floating_point()
        own = wide and tensor.untyped_storage().data_ptr() not in weights
        if own and tensor.numel() >= rows * width:
            kept.append(tensor.numel() // width)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@check(
    "K02",
    needs=("plan", "prepare", "loss"),
    settings=("kernels",),
    dealt=("-", "images", "packed", "lora-experts+kernels"),
)
def test_what_is_planned_is_applied(case: Case, subject: Subject, measured: Measured) -> None:
    """What the plan asks for runs in each layer that it is for, and nothing is left after `undo`.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3405
    """
    plan = subject.plan()
    model = subject.built(plan, case.setting)
    bare, tables = unwrapped(model), registered()
    before = places(bare)
    model = subject.adopt(model, plan)
    put = replaced(before, places(bare))
    experts = experts_of(model)
    name = planned_experts(model, plan) if experts else None
    seen = step(subject, model, put, name)
    measured |= {"replaced": len(put), "experts calls": sum(seen.experts.values())}
    assert_reached(case, model, put, seen.calls)
    for path, module in experts.items():
        runs, own = seen.runs[id(module)], module.config._experts_implementation
        assert runs and own == name, f"{case.id}: {path} ran {runs} times, by {own}, not by {name}"
        calls = seen.experts[id(module)]
        assert calls == runs or name == "eager", f"{case.id}: {path}: {calls} of {runs} by {name}"
    said = any("cross-entropy" in text or "loss" in text for text in plan.warnings)
    fused = case.setting.kernels == "on" and not said
    assert seen.logits != fused, f"{case.id}: logits kept: {seen.logits}, fused loss: {fused}"
    subject.impl.undo(model)
    left = [p.label for p in replaced(before, places(bare)) if p.of is None]
    left += [f"{key}" for key, value in registered().items() if tables.get(key) is not value]
    assert not left, f"{case.id}: undone, still in place: {left[:3]}"


def planned_experts(model: nn.Module, plan: Any) -> str:
    """The experts implementation that the plan names, or where it names none the model's own."""
    decision = plan.decisions.get("experts_implementation")
    own = next(iter(experts_of(model).values())).config._experts_implementation
    return str(own if decision is None or decision.value is None else decision.value)


def assert_reached(case: Case, model: nn.Module, put: Sequence[Place], calls: Calls) -> None:
    """A function in a place that was empty is called; one that is called runs in all layers of a
    type or in none; where a layer has one of its own, its modules run as often as in the others."""
    assert case.model is not None
    layers, types = layers_of(model, case.model), layer_types(model, case.model)
    owned = {id(m): i for i, layer in enumerate(layers) for m in layer.modules()}
    reached: dict[str, set[int | None]] = defaultdict(set)
    within: dict[tuple[str, str, str], dict[int, int]] = defaultdict(dict)
    for place in put:
        at = owned.get(id(place.of)) if place.of is not None else None
        found = calls.layers(place.label)
        kind = "hook" if isinstance(place.owner, dict) else str(place.name)
        group = place.label if at is None else f"{type(place.of).__name__} {kind}"
        reached[group] |= found
        whole = "vision" not in case.model.traits or case.setting.batch == "images"
        assert found or not (whole and place.new), f"{case.id}: {place.label} is new and not called"
        if at is not None and place.of is not None:
            for path, count in calls.children_of(place.of).items():
                within[types[at], group, path][at] = count
    told = set().union(*reached.values()) if reached else set()
    recurrent = {i for i, kind in enumerate(types) if kind == "linear_attention"}
    assert case.setting.batch != "packed" or recurrent <= told, (
        f"{case.id}: nothing tells the recurrent layers {sorted(recurrent - told)} of documents"
    )
    for group, found in reached.items():
        for kind in dict.fromkeys(types):
            all_of = {i for i, t in enumerate(types) if t == kind}
            some = all_of & found
            assert some in (set(), all_of), (
                f"{case.id}: {group} runs in layers {sorted(some)} of the {kind} layers"
                f" {sorted(all_of)}"
            )
    for (kind, group, path), counts in within.items():
        assert len(set(counts.values())) == 1, f"{case.id}: {kind}: {path} of {group} ran {counts}"


@contextmanager
def announcements() -> Iterator[list[str]]:
    """Every warning and every log record of that level or above inside the context."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, loggers = Keep(logging.WARNING), [logging.getLogger(n) for n in ("", "transformers")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield said
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            said += [str(w.message) for w in caught]


def served(subject: Subject, model: nn.Module) -> dict[str, bool]:
    """Which kernels a forward shows at work: no logits are kept; no weight of the experts' shape is
    made, as folding W + s·B·A would."""
    batch = subject.batch()
    shapes = {tuple(m.gate_up_proj.shape) for m in experts_of(model).values()}
    with kept_logits(model, batch) as kept, StorageWatch() as watch:
        subject.loss(model, batch)
    return {"fused loss": not kept, "experts with adapters": not shapes & watch.shapes}


def own_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """A loss that no kernel knows: the mean over all shifted labels, smoothed."""
    flat = logits[:, :-1].reshape(-1, vocab_size).float()
    return nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), label_smoothing=0.25)


def hinder(model: Any) -> None:
    """Ask for what a kernel has not: a loss of the user's own, two adapters at once."""
    if hasattr(model, "peft_config"):
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
    else:
        unwrapped(model).loss_function = own_loss


@check(
    "K06",
    needs=("plan", "prepare", "loss"),
    models=("gemma3-text", "mixtral", "qwen3_5_moe-text"),
    settings=("kernels", "lora-experts+kernels"),
)
def test_a_fallback_is_announced(case: Case, subject: Subject, measured: Measured) -> None:
    """A kernel that was asked for and does not run is announced: a warning, a log or an error.

    live defect L20: a loss of the user's own, and two active adapters, end a kernel silently
    """
    plan = subject.plan()
    model = subject.model(plan=plan)
    with announcements() as always:
        before = served(subject, model)
    missing = [name for name, runs in before.items() if not runs]
    assert not missing or plan.warnings, f"{case.id}: asked for and not there: {missing}"
    hinder(model)
    with announcements() as said:
        try:
            after = served(subject, model)
        except Exception as error:
            said.append(str(error))
            after = {}
    said = [text for text in said if text not in always]
    lost = [name for name, runs in before.items() if runs and not after.get(name)]
    measured |= {"kernels that stopped": len(lost), "announcements": len(said)}
    assert lost, f"{case.id}: nothing was hindered, so the check proves nothing"
    assert said, f"{case.id}: {', '.join(lost)} stopped without a word"


def foreign_configs() -> dict[str, Any]:
    """Tiny configs of models that a kernel may not do: experts with a bias, an unusual head."""
    import transformers

    size = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    kinds: dict[str, dict[str, Any]] = {
        "GptOssConfig": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        "CohereConfig": {"logit_scale": 0.25},
    }
    found = {}
    for name, more in kinds.items():
        if hasattr(transformers, name):
            config = getattr(transformers, name)(**size, **heads, **more, pad_token_id=0)
            config.architectures = [name.replace("Config", "ForCausalLM")]
            found[name] = config
    return found


@check("K20", needs=("plan", "prepare", "loss"), settings=("kernels",), per_model=False)
def test_an_unknown_layout_is_announced(
    case: Case, subject: Subject, measured: Measured, unsupported: Any
) -> None:
    """Kernels asked for a model whose experts or head they cannot do are announced or refused.

    live defect L20; kernels.md §1 (biased, transposed experts) and L22 (scaled logits)
    """
    import transformers

    configs = foreign_configs()
    if not configs:
        unsupported("this transformers has none of the models")
    for name, config in configs.items():
        with announcements() as said:
            try:
                plan = subject.impl.plan(config, Setting(kernels="on"), "single")
                said += list(plan.warnings)
                kind = getattr(transformers, config.architectures[0])
                model = subject.adopt(kind._from_config(config).to(subject.device), plan)
                ids = torch.arange(24, device=subject.device).reshape(2, 12) + 3
                batch = {"input_ids": ids, "labels": ids}
                with kept_logits(model, batch) as kept:
                    subject.loss(model, batch).backward()
                stock = [m.config._experts_implementation for m in experts_of(model).values()]
                done = not kept and not {"eager", "grouped_mm", "batched_mm"} & set(stock)
            except Exception as error:
                said.append(str(error))
                done = False
        measured[f"{name} announcements"] = len(said)
        assert done or said, f"{case.id}: {name}: its kernels are left out without a word"
