"""gemma3n given `inputs_embeds` runs without its per-layer inputs."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refused
from ..model_facts import every_module, unwrap
from ..training_plan import TrainingPlan

REASON = "logits from inputs_embeds differ by 9 to 14 % from those of the same input_ids"
ISSUE = "https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma3n"


def _decoder(model: nn.Module) -> Any:
    """The text model whose per-layer inputs come from ids alone, or None."""
    for module in every_module(unwrap(model)):
        made = getattr(type(module), "get_per_layer_inputs", None)
        if made and hasattr(module, "embed_tokens_per_layer"):
            # gemma4 also takes inputs_embeds there and recovers the ids itself
            return module if "inputs_embeds" not in signature(made).parameters else None
    return None


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the decoder cannot make per-layer inputs from embeddings."""
    return _decoder(model) is not None


def ids_of(embeds: Tensor, embedding: nn.Module) -> Tensor:
    """The ids (B, S) whose embeddings are exactly `embeds` (B, S, H); Refused if there are none.

    Looks in blocks of tokens at the column of largest spread, then confirms whole rows.
    """
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    flat = embeds.detach().reshape(-1, embeds.shape[-1])
    table = embedding(torch.arange(weight.shape[0], device=weight.device)).detach()
    found = torch.empty(flat.shape[0], dtype=torch.long, device=flat.device)
    for start in range(0, flat.shape[0], 64):
        block = flat[start : start + 64]
        same = block[:, None, 0] == table[None, :, 0]
        row, candidate = same.nonzero(as_tuple=True)
        exact = (table[candidate] == block[row]).all(-1)
        where = torch.full((block.shape[0],), -1, device=flat.device, dtype=torch.long)
        where[row[exact]] = candidate[exact]
        found[start : start + 64] = where
    if bool((found < 0).any()):
        raise Refused(
            "inputs_embeds are not embeddings of tokens, so the per-layer inputs cannot be made;"
            " pass per_layer_inputs with them"
        )
    return found.reshape(embeds.shape[:-1])


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Recover the ids by exact look-up and supply the per-layer inputs."""
    decoder = _decoder(model)

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        missing = kwargs.get("per_layer_inputs") is None and kwargs.get("input_ids") is None
        if embeds is None or args or not missing:
            return None
        ids = ids_of(embeds, decoder.embed_tokens)
        return args, {**kwargs, "per_layer_inputs": decoder.get_per_layer_inputs(ids)}

    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    return handle.remove  # type: ignore[no-any-return]
