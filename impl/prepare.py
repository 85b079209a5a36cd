"""Make a loaded model ready to train by a plan, and take everything back."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from . import patches
from .adapters import attach
from .errors import Refused
from .freeze import freeze
from .model_facts import is_adapted, is_moe, text_config, unwrap
from .prepared import Prepared, forget, remember, state_of
from .training_plan import TrainingPlan

STOCK_EXPERTS = ("eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")


def prepare(model: nn.Module, plan: TrainingPlan) -> nn.Module:
    """patch → freeze → adapt → kernels → checkpointing → offload; ready to train.

    Returns the model, or its PeftModel when the plan adapts it. A model that is prepared already
    is returned as it is (Refused if it was by another plan: undo first). If a step fails, all
    earlier ones are taken back and the error is raised.
    """
    before = state_of(model)
    if before is not None:
        if before.plan is not plan and before.plan != plan:
            raise Refused("the model is prepared by another plan; call undo(model) first")
        return model
    state = Prepared(plan)
    ready = model
    try:
        patches.apply(model, plan, state.undo)
        state.undo.append(freeze(model, plan.freeze))
        if not is_adapted(model):
            ready = attach(model, plan)
        _kernels(ready, plan, state)
        _checkpointing(ready, plan, state)
        _offload(ready, plan, state)
    except BaseException:
        state.take_back()
        if ready is not model:
            _detach(ready)
        raise
    ready.train()
    remember(ready, state)
    return ready


def undo(model: nn.Module) -> None:
    """Take back what `prepare` did, global and per model; nothing happens to an unprepared model.

    Adapters stay: they hold what was trained. The parameters' requires_grad flags of an adapted
    model stay too, except in components that `prepare` froze.
    """
    state = forget(model)
    if state is not None:
        state.take_back()


def _detach(adapted: Any) -> None:
    """Remove adapters that were attached before a later step failed."""
    adapted.unload()


def _kernels(model: nn.Module, plan: TrainingPlan, state: Prepared) -> None:
    inner: Any = unwrap(model)
    wanted = plan.experts_implementation
    if wanted is not None and is_moe(model):
        if wanted not in STOCK_EXPERTS:
            state.undo.append(_register_experts(wanted))
        if hasattr(inner, "set_experts_implementation"):
            _set_experts(inner, wanted, state)
    if plan.fused_loss:
        try:
            from .kernels import cross_entropy_models
        except ImportError as error:
            raise Refused(f"the fused loss is not available here: {error}") from error
        enabled = cross_entropy_models.enable(unwrap(model))
        if not enabled.applied:
            raise Refused(f"the fused loss was asked for: {enabled.reason}")
        state.undo.append(enabled)
        state.fused_loss = True


_registered = 0


def _register_experts(wanted: str) -> Callable[[], None]:
    """Make our experts kernel known to transformers while any prepared model asks for it."""
    global _registered
    from .kernels import registration

    if wanted != registration.NAME:
        raise Refused(
            f"experts_implementation={wanted!r} is not known; it is {registration.NAME!r} or one of"
            f" {', '.join(STOCK_EXPERTS)}"
        )
    if _registered == 0 and registration.is_registered():
        return lambda: None  # someone else's, and theirs to take back
    registration.register()
    _registered += 1

    def undo() -> None:
        global _registered
        _registered -= 1
        if _registered == 0:
            registration.unregister()

    return undo


def _set_experts(inner: Any, wanted: str, state: Prepared) -> None:
    """Switch between transformers' own implementations, and back on undo."""
    before = getattr(text_config(inner), "_experts_implementation", None)
    if before == wanted:
        return
    try:
        inner.set_experts_implementation(wanted)
    except ValueError:  # transformers 5.5 knows a fixed list there; its registry has ours
        if wanted in STOCK_EXPERTS:
            raise
        inner.config._experts_implementation = wanted
    now = getattr(text_config(inner), "_experts_implementation", None)
    if now != wanted:
        raise Refused(f"experts_implementation={wanted!r} did not take effect: it is {now!r}")
    if before is not None:
        state.undo.append(lambda: inner.set_experts_implementation(before))


def _checkpointing(model: nn.Module, plan: TrainingPlan, state: Prepared) -> None:
    if plan.checkpointing is None:
        return
    inner: Any = unwrap(model)
    kwargs = dict(plan.checkpointing)
    newer = hasattr(inner, "activation_checkpointing_enable")  # the older name warns there
    if newer:
        inner.activation_checkpointing_enable(kwargs)
        state.undo.append(inner.activation_checkpointing_disable)
    else:
        inner.gradient_checkpointing_enable(kwargs)
        state.undo.append(inner.gradient_checkpointing_disable)
    state.undo.append(inner.disable_input_require_grads)
    on = inner.is_activation_checkpointing if newer else inner.is_gradient_checkpointing
    if not on:
        raise Refused(f"gradient checkpointing did not take effect on {type(inner).__name__}")
    if kwargs.get("use_reentrant") and not getattr(inner, "_require_grads_hooks", None):
        # a reentrant segment whose inputs need no gradient gives none to the adapters inside it
        inner.enable_input_require_grads()


def _offload(model: nn.Module, plan: TrainingPlan, state: Prepared) -> None:
    if not plan.offload:
        return
    try:
        module = import_module(f"{__package__}.activation_offload")
    except ImportError as error:
        raise Refused(
            f"activation_offloading={plan.offload!r} is not available: {error}"
        ) from error
    state.undo.append(module.enable(model, plan.offload))
