"""Gated delta networks carry their state and convolution over the documents of a packed row."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from ..cache_argument import without_cache
from ..documents import document_ids
from ..errors import Refused
from ..kernels import gated_delta_rule as kernel
from ..model_facts import gated_delta_layers
from ..training_plan import TrainingPlan
from .swap import swap

REASON = (
    "boundaries come only from cu_seq_lens_q and seq_idx, never from position ids, and the torch"
    " fallback takes neither"
)
ISSUE = "https://github.com/huggingface/transformers/issues/44717"
_CONVOLUTION, _RULE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the model has such layers; any batch may be packed."""
    return next(gated_delta_layers(model), None) is not None


def _can_pass_documents(network: nn.Module) -> bool:
    """Whether keyword arguments of the network reach both functions of its modelling module."""
    functions = vars(sys.modules[type(network).__module__])
    kinds = [p.kind for p in signature(type(network).forward).parameters.values()]
    # transformers 5.12 has the names too, but may hold None, and each network keeps its own
    held = hasattr(network, _CONVOLUTION) or not callable(functions.get(_CONVOLUTION))
    return Parameter.VAR_KEYWORD in kinds and _RULE in functions and not held


def _convolution(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def convolve(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if document_ids is None:
            result: Tensor = original(hidden_states, weight, bias, activation=activation, **kwargs)
            return result
        return kernel.causal_conv1d(hidden_states, weight, bias, activation, document_ids)

    return convolve


def _rule(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def chunk_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if document_ids is None:
            return original(query, key, value, **kwargs)
        kept = {k: v for k, v in kwargs.items() if k in kernel.RULE_ARGUMENTS}
        return kernel.gated_delta_rule(query, key, value, document_ids=document_ids, **kept)

    return chunk_rule


def _hook(passes: bool) -> Callable[..., Any]:
    def give_documents(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        ids = document_ids(kwargs.get("position_ids"))
        if ids is None:
            return None
        if not passes:
            raise Refused(
                "these gated delta layers cannot be told where packed documents start; train"
                " unpacked, or with a newer transformers"
            )
        # `packed_rows` sees to it that there is none to continue from; one just made stays empty
        return args, {**without_cache(kwargs), "document_ids": ids}

    return give_documents


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Pass document ids to the convolution and the delta rule of every such layer.

    The ids travel as a keyword argument of the decoder layer, so that recomputation under
    checkpointing gets them too (transformers dropped `cu_seq_lens_q` one call early until 5.8.1).
    """
    undo: list[Callable[[], None]] = []
    for layer, network in gated_delta_layers(model):
        passes = _can_pass_documents(network)
        if passes:
            module = sys.modules[type(network).__module__]
            undo += [swap(module, _CONVOLUTION, _convolution), swap(module, _RULE, _rule)]
        undo.append(layer.register_forward_pre_hook(_hook(passes), with_kwargs=True).remove)

    def take_back() -> None:
        for step in reversed(undo):
            step()

    return take_back
