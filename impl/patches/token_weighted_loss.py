"""Classes that say they take no loss arguments, although their forward honours them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..model_facts import device_of, on_meta, placeholder_ids, text_config, unwrap
from ..training_plan import TrainingPlan

REASON = (
    "accepts_loss_kwargs is False on five multimodal classes, so a trainer averages the means of"
    " micro-batches of unequal label counts"
)
ISSUE = "https://github.com/axolotl-ai-cloud/axolotl/pull/3706"


# The answer for each class and forward that was tried; it is a property of the code.
_honours: dict[tuple[Any, ...], bool] = {}


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the class denies loss arguments and its forward provably honours them."""
    inner = unwrap(model)
    denied = getattr(inner, "accepts_loss_kwargs", None) is False
    if not denied or on_meta(model):
        return False
    forward: Any = inner.forward
    tried = (type(inner), getattr(forward, "__func__", forward), type(text_config(inner)))
    if tried not in _honours:
        _honours[tried] = honours_item_count(inner)
    return _honours[tried]


def honours_item_count(model: nn.Module) -> bool:
    """Whether forward(num_items_in_batch=N) is the sum over labelled tokens divided by N.

    Tried on two predicted tokens, in evaluation mode and without gradients: the loss with N = 1,
    with N = 7 and the mean must agree as 14 : 2 : 7.
    """
    ids = _three_text_tokens(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=ids, labels=ids, num_items_in_batch=1, use_cache=False).loss
            part = model(input_ids=ids, labels=ids, num_items_in_batch=7, use_cache=False).loss
            mean = model(input_ids=ids, labels=ids, use_cache=False).loss
    finally:
        for module, training in modes:
            module.training = training
        _reshard(model)
    one, seventh, half = float(whole), float(part), float(mean)
    close = 8 * torch.finfo(whole.dtype).eps * abs(one)
    return abs(one - 7 * seventh) <= 7 * close and abs(one - 2 * half) <= 2 * close


def _reshard(model: nn.Module) -> None:
    """Give back the whole weights that a forward without backward leaves in place of the shards.

    Freezing, or an optimizer, would take those for the model's parameters, and train nothing.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _three_text_tokens(model: nn.Module) -> torch.Tensor:
    special = placeholder_ids(model) | {getattr(text_config(model), "pad_token_id", None)}
    free = (i for i in range(text_config(model).vocab_size) if i not in special)
    return torch.tensor([[next(free), next(free), next(free)]], device=device_of(model))


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Say so on the instance."""
    inner: Any = unwrap(model)
    inner.accepts_loss_kwargs = True

    def undo() -> None:
        vars(inner).pop("accepts_loss_kwargs", None)

    return undo
