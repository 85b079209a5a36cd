"""Registers the experts kernel with transformers as ``"scattermoe"``; PEFT adapters reach it.

``register`` adds one function to transformers' experts interface and replaces PEFT's
``ParamWrapper.forward``; ``unregister`` takes both back. A wrapper around an experts module that
runs ``"scattermoe"`` hands its factors to the kernel instead of forming ``W + s B A`` by
parametrization (`live-defects.md` L13, L24). Whatever the kernel does not do runs the plain stack,
with a `KernelFallbackWarning` and a count in `calls`: nothing falls back silently (L20).
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .experts import moe_lora_experts
from .experts_problem import ACTIVATIONS, ExpertLora
from .experts_torch import gate_and_slope

NAME = "scattermoe"
_PARAMETERS = {"gate_up_proj": "gate_up", "down_proj": "down"}


class KernelFallbackWarning(UserWarning):
    """A requested kernel does not run here; the plain stack does."""


@dataclass
class Calls:
    """How often each way was taken since `reset`: the observable behind "the kernel is applied"."""

    base: int = 0  # the kernel without an adapter
    fused: int = 0  # the kernel with unfolded adapter factors
    plain: int = 0  # the plain stack
    reasons: Counter[str] = field(default_factory=Counter)  # why, for each plain call

    def reset(self) -> None:
        """Start counting anew."""
        self.base = self.fused = self.plain = 0
        self.reasons.clear()


calls = Calls()
_state = threading.local()
_peft_forward: tuple[Callable[..., Any], Callable[..., Any]] | None = None
_activations: WeakKeyDictionary[nn.Module, tuple[Any, str | None]] = WeakKeyDictionary()


def register() -> None:
    """Register ``"scattermoe"`` and take over PEFT's parameter adapters, if PEFT is there.

    Calling it twice is harmless. Raises RuntimeError if another function already has the name.
    """
    global _peft_forward
    interface, registry = _interface()
    present = registry.get(NAME)
    if present is not None and present is not experts_forward:
        raise RuntimeError(
            f"experts implementation {NAME!r} is already registered as {_name(present)}"
        )
    interface.register(NAME, experts_forward)
    wrapper = _param_wrapper()
    if wrapper is None or wrapper.forward is _wrapper_forward:
        return
    _peft_forward = (wrapper.forward, _wrapper_forward)
    wrapper.forward = _wrapper_forward


def unregister() -> None:
    """Take back what `register` did; what someone else put on top since then is left alone."""
    global _peft_forward
    interface, _ = _interface()
    if interface._global_mapping.get(NAME) is experts_forward:
        del interface._global_mapping[NAME]
    wrapper = _param_wrapper()
    if _peft_forward is not None and wrapper is not None:
        original, ours = _peft_forward
        if wrapper.forward is ours:
            wrapper.forward = original
            _peft_forward = None


def is_registered() -> bool:
    """Whether transformers would find our function under the name."""
    return _interface()[1].get(NAME) is experts_forward


def why_unsupported(module: nn.Module) -> str | None:
    """Why the kernel cannot run an experts module, in one line; None if it can."""
    flags = {
        "is_transposed": (False, "transposed weights"),
        "has_bias": (False, "biased experts"),
        "is_concatenated": (True, "interleaved gate and up"),
        "has_gate": (True, "experts without a gate"),
        "has_post_expert_norm": (False, "a norm after the experts"),
    }
    for flag, (wanted, words) in flags.items():
        if getattr(module, flag, wanted) != wanted:
            return words
    if not all(hasattr(module, name) for name in _PARAMETERS):
        return "no gate_up_proj and down_proj"
    if activation_of(module) is None:
        act = type(getattr(module, "act_fn", None)).__name__
        return f"activation {act} is not one of {', '.join(ACTIVATIONS)}"
    return None


def activation_of(module: nn.Module) -> str | None:
    """The activation by what the module's gate computes on a probe, not by its name (L15)."""
    act_fn = getattr(module, "act_fn", None)
    known = _activations.get(module)
    if known is None or known[0] is not act_fn:
        known = _activations[module] = (act_fn, _probe(module))
    act: str | None = known[1]
    return act


@torch.no_grad()
def _probe(module: nn.Module) -> str | None:
    """Compare the module's gate with ``act(gate) * up`` on values wide enough to show a clamp."""
    gate = torch.linspace(-60.0, 60.0, 481, dtype=torch.float64)
    up = torch.linspace(90.0, -70.0, 481, dtype=torch.float64)
    try:
        gating: Any = getattr(module, "_apply_gate", None)
        activation: Any = getattr(module, "act_fn", None)
        found = gating(torch.cat([gate, up])[None])[0] if gating else activation(gate) * up
    except (AttributeError, RuntimeError, TypeError):
        return None
    for name in ACTIVATIONS:
        wanted = gate_and_slope(gate, name)[0] * up
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-6, atol=1e-8):
            return name
    return None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The function under ``"scattermoe"``: ``(T, H)`` to ``(T, H)``, see `moe_lora_experts`."""
    lora = _take_lora(module)
    reason = _reason_against(module)
    if reason is not None:
        assert lora is None, "factors are handed over only where the kernel runs"
        return _plain(module, reason, hidden_states, top_k_index, top_k_weights)
    out = moe_lora_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        module.gate_up_proj,  # type: ignore[arg-type]
        module.down_proj,  # type: ignore[arg-type]
        act=str(activation_of(module)),
        lora=lora,
    )
    if lora is None:
        calls.base += 1
    else:
        calls.fused += 1
    return out


def _reason_against(module: nn.Module) -> str | None:
    """Why this call must run the plain stack: the layout, or an adapter folded in by PEFT."""
    if getattr(_state, "declined", None) is module:
        return str(_state.reason)
    return why_unsupported(module)


def _plain(module: nn.Module, reason: str, *inputs: Tensor) -> Tensor:
    """Run what the stack runs without us: grouped_mm, or eager where that refuses the dtype."""
    calls.plain += 1
    calls.reasons[reason] += 1
    warnings.warn(f"{NAME} runs the plain stack: {reason}", KernelFallbackWarning, stacklevel=3)
    eager = getattr(type(module).forward, "__wrapped__", None)
    grouped = _interface()[1].get("grouped_mm")
    if grouped is None or (eager is not None and inputs[0].dtype == torch.float64):
        if eager is None:
            raise RuntimeError(f"{NAME} does not run {type(module).__name__}: {reason}")
        grouped = eager
    out: Tensor = grouped(module, *inputs)
    return out


def _wrapper_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """PEFT's ``ParamWrapper.forward``: hand the factors over, or do what PEFT does."""
    assert _peft_forward is not None
    original = _peft_forward[0]
    chain, experts = _chain(self)
    if (
        getattr(_state, "owner", None) is experts
    ):  # an outer wrapper has decided for the whole chain
        if _state.lora is not None:
            return self.base_layer(x, *args, **kwargs)
        return original(self, x, *args, **kwargs)
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if implementation != NAME or not _any_adapter(chain):
        return original(self, x, *args, **kwargs)
    return _decide(self, original, chain, experts, x, *args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _decide(
    outer: Any,
    original: Callable[..., Any],
    chain: list[Any],
    experts: nn.Module,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a chain of wrappers that has an active adapter: fused if it can be, else plain."""
    reason = why_unsupported(experts) or _why_not_fused(chain, kwargs)
    if reason is None:
        with _handing_over(experts, _factors(chain), None):
            return outer.base_layer(x, *args, **kwargs)
    with _handing_over(experts, None, reason):
        return original(outer, x, *args, **kwargs)


def _chain(outer: Any) -> tuple[list[Any], nn.Module]:
    """The nested wrappers from the outermost in, and the experts module inside."""
    wrapper, chain, layer = _param_wrapper(), [], outer
    while wrapper is not None and isinstance(layer, wrapper):
        chain.append(layer)
        layer = layer.base_layer
    return chain, layer


def _active(wrapper: Any) -> list[str]:
    """The active adapters that this wrapper holds."""
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _any_adapter(chain: list[Any]) -> bool:
    """Whether some wrapper would change its weight in this forward."""
    return any(_active(w) and not w.disable_adapters and not w.merged for w in chain)


def _why_not_fused(chain: list[Any], kwargs: dict[str, Any]) -> str | None:
    """Why an adapter cannot be fused: fused is exactly one active, unmerged, enabled adapter."""
    if kwargs.get("adapter_names"):
        return "a mixed batch of adapters"
    names = {name for w in chain for name in _active(w)}
    if len(names) > 1:
        return f"{len(names)} active adapters"
    for w in chain:
        if w.parameter_name not in _PARAMETERS:
            return f"an adapter on {w.parameter_name}"
        if w.disable_adapters or w.merged:
            return "an adapter that is disabled or merged on one parameter only"
    if len({w.parameter_name for w in chain}) < len(chain):
        return "two wrappers on one parameter"
    return None


def _factors(chain: list[Any]) -> ExpertLora:
    """The one active adapter's factors, as they are stored; no copy."""
    values: dict[str, Any] = {}
    for w in chain:
        for name in _active(w):
            side = _PARAMETERS[w.parameter_name]
            values[f"{side}_a"] = w.lora_A[name].weight
            values[f"{side}_b"] = w.lora_B[name].weight
            values[f"{side}_scale"] = float(w.scaling[name])
    return ExpertLora(**values)


@contextmanager
def _handing_over(owner: nn.Module, lora: ExpertLora | None, reason: str | None) -> Iterator[None]:
    """Hold the factors, or the reason against, for the call inside; per thread, nestable."""
    names = ("owner", "lora", "declined", "reason")
    before = [getattr(_state, name, None) for name in names]
    values = (owner, lora, None if reason is None else owner, reason)
    for name, value in zip(names, values, strict=True):
        setattr(_state, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(_state, name, value)


def _take_lora(module: nn.Module) -> ExpertLora | None:
    """The factors a wrapper holds for this module, if any."""
    if getattr(_state, "owner", None) is not module:
        return None
    lora: ExpertLora | None = _state.lora
    return lora


def _interface() -> tuple[Any, Any]:
    """Transformers' class to register with, and its live registry."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

    return ExpertsInterface, ALL_EXPERTS_FUNCTIONS


def _param_wrapper() -> Any:
    """PEFT's wrapper of a parameter, or None without a PEFT that has it."""
    try:
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        return None
    return ParamWrapper


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
