"""Puts the fused loss under a transformers model: one table, no rewritten forward.

For one call in training mode with labels, the classifier head's forward computes the loss from the
hidden states it is given and returns a stand-in for the logits. The model's own code goes on with
it: the stand-in records a softcap, `loss_function` hands out the computed loss, an auxiliary loss
is added by the model itself. Whatever else the model does with its logits makes the stand-in
compute them, and the model's own loss is used and the fact announced. So nothing a head does can
be dropped silently (live-defects L20, L21, L22), and weights are read inside the head's forward,
where FSDP2 has gathered them.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .cross_entropy import LowRank, causal_lm_loss


class Head(NamedTuple):
    """How a model class turns hidden states into logits, beside its output embedding."""

    softcap: bool  # whether the forward applies the text config's `final_logit_softcapping`


# Every model class here: `logits = lm_head(hidden)`, then the softcap where the class has one; no
# logit scale. Router losses of the MoE classes are added by their own forward.
HEADS: dict[str, Head] = {
    "Gemma3ForCausalLM": Head(softcap=True),
    "Gemma3ForConditionalGeneration": Head(softcap=False),
    "Gemma3nForCausalLM": Head(softcap=True),
    "Gemma3nForConditionalGeneration": Head(softcap=True),
    "Gemma4ForCausalLM": Head(softcap=True),
    "Gemma4ForConditionalGeneration": Head(softcap=True),
    "Gemma4UnifiedForCausalLM": Head(softcap=True),
    "Gemma4UnifiedForConditionalGeneration": Head(softcap=True),
    "MixtralForCausalLM": Head(softcap=False),
    "Qwen2MoeForCausalLM": Head(softcap=False),
    "Qwen3MoeForCausalLM": Head(softcap=False),
    "Qwen3NextForCausalLM": Head(softcap=False),
    "Qwen3_5ForCausalLM": Head(softcap=False),
    "Qwen3_5ForConditionalGeneration": Head(softcap=False),
    "Qwen3_5MoeForCausalLM": Head(softcap=False),
    "Qwen3_5MoeForConditionalGeneration": Head(softcap=False),
}


class Enabled:
    """What `enable` did; call it to undo. `calls` counts losses computed without logits."""

    def __init__(self, model: nn.Module | None, reason: str, previous: Any = None) -> None:
        self.model = model
        self.reason = reason
        self._previous = previous  # an instance-level forward (accelerate's) that we wrapped
        self.calls = 0
        self.fallbacks: list[str] = []

    @property
    def applied(self) -> bool:
        """Whether a model was wired."""
        return self.model is not None

    def fall_back(self, why: str) -> None:
        """Announce, once for each reason, that the model's own loss is used."""
        if why not in self.fallbacks:
            self.fallbacks.append(why)
            warnings.warn(f"linear cross-entropy not used: {why}", stacklevel=3)

    def __call__(self) -> None:
        """Give the model its own forward back."""
        if self.model is not None:
            _put_back(self.model, "forward", self._previous)
            self.model = None
            self.reason = "undone"


def enable(model: nn.Module, **options: Any) -> Enabled:
    """Train `model` (bare, or inside PEFT or DDP) with the fused loss until the result is called.

    `options` go to `linear_cross_entropy` (`memory_budget`, `mode`, `z_loss`). A class outside
    `HEADS` keeps its own loss: a warning says so, `.applied` is False, `.reason` names the class.
    In evaluation, without labels, with `logits_to_keep` or a custom loss function, the model's own
    path runs too. The output's `logits` are None where the fused loss was used.
    """
    found = [m for m in model.modules() if _class_name(m) in HEADS]
    if len(found) != 1:
        name = _class_name(_innermost(model))
        why = f"{name} is not in the table of known heads; it keeps its own loss"
        enabled = Enabled(None, why)
        enabled.fall_back(why)
        return enabled
    target = found[0]
    if "forward" in target.__dict__ and hasattr(target.forward, "_fused_loss"):
        raise ValueError(f"{_class_name(target)} already has the fused loss enabled")
    previous = target.__dict__.get("forward")
    enabled = Enabled(target, f"{_class_name(target)}: loss from hidden states", previous)
    inner = target.forward
    shared = calls_loss_function(type(target))

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        why = _own_path(target, args, kwargs)
        if why is not None:
            if why:
                enabled.fall_back(why)
            return inner(*args, **kwargs)
        calls = enabled.calls
        with _intercepted(target, kwargs, enabled, options):
            if shared:
                output = inner(*args, **kwargs)
            else:
                output = _with_loss(target, inner(*args, **_without_labels(kwargs)), kwargs)
        logits = output.get("logits")
        if isinstance(logits, _Deferred):
            if enabled.calls > calls:
                return type(output)(**{k: v for k, v in output.items() if k != "logits"})
            output["logits"] = logits.materialise("its logits do more than pass the softcap")
        return output

    forward._fused_loss = True  # type: ignore[attr-defined]
    target.__dict__["forward"] = forward
    return enabled


def calls_loss_function(cls: type[nn.Module]) -> bool:
    """Whether a class's forward leaves its loss to `loss_function`; older multimodal ones compute
    a mean of their own, without shifted labels and without a count."""
    return "loss_function(" in inspect.getsource(cls.forward)


_LOSS_ARGUMENTS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index")


def _without_labels(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _LOSS_ARGUMENTS}


def _with_loss(model: Any, output: Any, kwargs: dict[str, Any]) -> Any:
    """The output of a forward without labels, and the loss that `loss_function` makes of it."""
    given = {n: kwargs[n] for n in _LOSS_ARGUMENTS if kwargs.get(n) is not None}
    vocab_size = model.config.get_text_config().vocab_size
    loss = model.loss_function(logits=output["logits"], vocab_size=vocab_size, **given)
    return type(output)(loss=loss, **{k: v for k, v in output.items() if k != "loss"})


def _class_name(module: nn.Module) -> str:
    """The class that FSDP2 may have renamed by its prefix."""
    return type(module).__name__.removeprefix("FSDP")


def _own_path(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """None: use the fused loss. Otherwise the model's own path: why, "" if nothing to announce."""
    if not model.training or (kwargs.get("labels") is None and len(args) < 4):
        return ""
    if args[1:] or kwargs.get("labels") is None:
        return "labels must be given by keyword"
    keep = kwargs.get("logits_to_keep", 0)
    if not isinstance(keep, int) or keep != 0:
        return "logits_to_keep asks for logits of part of the sequence"
    if kwargs.get("return_dict") is False:
        return "return_dict=False asks for a tuple with logits"
    if getattr(model.loss_function, "__name__", "") != "ForCausalLMLoss":
        return "the model has a loss function of its own"
    return None


@contextmanager
def _intercepted(
    model: Any, kwargs: dict[str, Any], enabled: Enabled, options: dict[str, Any]
) -> Iterator[None]:
    """Head and loss function of one forward, replaced on the instance and put back after it."""
    head = model.get_output_embeddings()
    own_head, own_loss = head.forward, model.loss_function
    had_head, had_loss = head.__dict__.get("forward"), model.__dict__.get("_loss_function")
    softcap = None
    if HEADS[_class_name(model)].softcap:
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def head_forward(hidden: torch.Tensor, *args: Any, **kw: Any) -> Any:
        parts, why = _head_parts(head, hidden)
        if had_head is not None:
            why = "the head's forward is already replaced (offloading hooks)"
        if parts is None or why or args or kw:
            enabled.fall_back(why or "the head takes more than hidden states")
            return own_head(hidden, *args, **kw)
        weight, bias, lora = parts
        names = ("shift_labels", "num_items_in_batch", "ignore_index")
        loss = causal_lm_loss(
            hidden, weight, kwargs["labels"], bias=bias, softcap=softcap, lora=lora, **options,
            **{n: kwargs[n] for n in names if kwargs.get(n) is not None},
        )  # fmt: skip
        return _Deferred(loss, lambda: own_head(hidden), softcap, enabled)

    @functools.wraps(own_loss)
    def loss_function(*args: Any, **kw: Any) -> torch.Tensor:
        logits = args[0] if args else kw["logits"]
        if isinstance(logits, _Deferred):
            taken: torch.Tensor | None = logits.take()
            if taken is not None:
                return taken
            logits = logits.materialise("its logits do not pass through the expected softcap")
            args, kw = ((logits, *args[1:]), kw) if args else (args, {**kw, "logits": logits})
        result: torch.Tensor = own_loss(*args, **kw)
        return result

    head.forward, model._loss_function = head_forward, loss_function
    try:
        yield
    finally:
        _put_back(head, "forward", had_head)
        _put_back(model, "_loss_function", had_loss)


def _put_back(module: Any, name: str, value: Any) -> None:
    """Restore an instance attribute that hid the class's."""
    if value is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value


class _Deferred:
    """Stands for logits of which only the loss exists; knows the softcap the loss contains."""

    def __init__(
        self,
        loss: torch.Tensor,
        compute: Callable[[], torch.Tensor],
        softcap: float | None,
        enabled: Enabled,
        steps: tuple[tuple[str, float], ...] = (),
    ) -> None:
        self._loss, self._compute, self._softcap = loss, compute, softcap
        self._enabled, self._steps = enabled, steps

    def _then(self, kind: str, value: float = 0.0) -> _Deferred:
        steps = (*self._steps, (kind, value))
        return _Deferred(self._loss, self._compute, self._softcap, self._enabled, steps)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # guards on the count: compiled anew
    def take(self) -> torch.Tensor | None:
        """The loss, if the model did to its logits exactly what the loss contains."""
        cap = self._softcap
        expected = () if cap is None else (("divide", cap), ("tanh", 0.0), ("multiply", cap))
        if self._steps != expected:
            return None
        self._enabled.calls += 1
        return self._loss

    def materialise(self, why: str) -> torch.Tensor:
        """The real logits, after the recorded steps."""
        self._enabled.fall_back(f"{self._enabled.reason.split(':')[0]}: {why}")
        logits = self._compute()
        for kind, value in self._steps:
            if kind == "tanh":
                logits = torch.tanh(logits)
            else:
                logits = logits / value if kind == "divide" else logits * value
        return logits

    def __truediv__(self, value: float) -> _Deferred:
        return self._then("divide", value)

    def __mul__(self, value: float) -> _Deferred:
        return self._then("multiply", value)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """tanh is recorded; any other function gets the real logits."""
        if func is torch.tanh and isinstance(args[0], cls):
            return args[0]._then("tanh")
        name = getattr(func, "__name__", str(func))

        def real(x: Any) -> Any:
            return x.materialise(f"its forward applies {name}") if isinstance(x, cls) else x

        args = tuple(real(a) for a in args)
        return func(*args, **{k: real(v) for k, v in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.materialise(f"its forward uses logits.{name}"), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.materialise("its forward slices the logits")[index]


# FSDP2 looks for tensors in a module's output to know when the backward enters the module.
pytree.register_pytree_node(
    _Deferred,
    lambda d: ([d._loss], (d._compute, d._softcap, d._enabled, d._steps)),
    lambda loss, context: _Deferred(next(iter(loss)), *context),
)


def _head_parts(
    head: Any, hidden: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor | None, LowRank | None] | None, str]:
    """(weight, bias, adapter) of a head this loss can reproduce, or None and why not."""
    while hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        active = [] if head.disable_adapters else list(head.active_adapters)
        head = head.modules_to_save[active[0]] if active else head.original_module
    lora: LowRank | None = None
    if hasattr(head, "base_layer") and hasattr(head, "lora_A"):
        if not head.disable_adapters and not head.merged:
            lora, why = _adapter(head, hidden)
            if why:
                return None, why
        head = head.base_layer
    if not isinstance(head, nn.Linear):
        return None, f"the head is a {type(head).__name__}"
    weight = head.weight
    if type(weight.data).__name__ == "DTensor" or not weight.is_floating_point():
        return None, "the head's weight is sharded or quantised"
    if tuple(weight.shape) != (head.out_features, head.in_features):
        return None, "the head's weight is packed or flattened"
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        return None, f"hidden states are {hidden.dtype}, the head's weight {weight.dtype}"
    return (weight, head.bias, lora), ""


def _adapter(layer: Any, hidden: torch.Tensor) -> tuple[LowRank | None, str]:
    """The active LoRA adapters of a PEFT linear layer as extra columns."""
    if getattr(layer, "lora_variant", None):
        return None, "the head's adapter is a LoRA variant (DoRA, aLoRA)"
    features, columns = [], []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b = layer.lora_A[name], layer.lora_B[name]
        if getattr(b, "bias", None) is not None or not isinstance(a, nn.Linear):
            return None, "the head's adapter has a bias or is not linear"
        x = layer.lora_dropout[name](hidden.to(a.weight.dtype))
        features.append(a(x) * layer.scaling[name])
        columns.append(b.weight)
    if not features:
        return None, ""
    joined = torch.cat(features, -1)
    return LowRank(joined.reshape(-1, joined.shape[-1]), torch.cat(columns, 1)), ""


def _innermost(model: nn.Module) -> nn.Module:
    """The model inside PEFT, DDP and the like, for messages."""
    while True:
        get = getattr(model, "get_base_model", None)
        inner = get() if callable(get) else getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner
