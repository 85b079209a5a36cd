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
from .model_facts import is_adapted, is_moe, unwrap
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
            enable = _kernel("experts", "enable", f"experts_implementation={wanted!r}")
            state.undo.append(enable(model))
        elif hasattr(inner, "set_experts_implementation"):
            _set_experts(inner, wanted, state)
    if plan.fused_loss:
        enable = _kernel("cross_entropy_models", "enable", "the fused loss")
        state.undo.append(enable(model))
        state.fused_loss = True


def _set_experts(inner: Any, wanted: str, state: Prepared) -> None:
    """Switch between transformers' own implementations, and back on undo."""
    from .model_facts import text_config

    before = getattr(text_config(inner), "_experts_implementation", None)
    if before == wanted:
        return
    inner.set_experts_implementation(wanted)
    now = getattr(text_config(inner), "_experts_implementation", None)
    if now != wanted:
        raise Refused(f"experts_implementation={wanted!r} did not take effect: it is {now!r}")
    if before is not None:
        state.undo.append(lambda: inner.set_experts_implementation(before))


def _kernel(module: str, function: str, what: str) -> Callable[[nn.Module], Callable[[], None]]:
    """A function of our kernels that switches itself on and returns its undo; else Refused."""
    try:
        found = getattr(import_module(f"{__package__}.kernels.{module}"), function)
    except (ImportError, AttributeError) as error:
        raise Refused(f"{what} was asked for and is not available here: {error}") from error
    assert callable(found)
    return found  # type: ignore[no-any-return]


def _checkpointing(model: nn.Module, plan: TrainingPlan, state: Prepared) -> None:
    if plan.checkpointing is None:
        return
    inner: Any = unwrap(model)
    kwargs = dict(plan.checkpointing)
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    state.undo.append(inner.gradient_checkpointing_disable)
    if not inner.is_gradient_checkpointing:
        raise Refused(f"gradient checkpointing did not take effect on {type(inner).__name__}")
    if kwargs.get("use_reentrant") and is_adapted(model):
        # a reentrant segment whose inputs need no gradient gives none to the adapters inside it
        inner.enable_input_require_grads()
        state.undo.append(inner.disable_input_require_grads)


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
