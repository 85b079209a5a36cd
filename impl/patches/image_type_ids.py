"""An image without its modality ids is attended to causally; text without them may be refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Refused
from ..model_facts import (
    IMAGE_INPUT_NAMES,
    bidirectional_images,
    body,
    text_config,
    type_id_name,
    unwrap,
)
from ..training_plan import TrainingPlan

REASON = (
    "the modality ids decide which positions attend in both directions (without them logits differ"
    " by 0.4 to 0.8); since transformers 5.6 they are optional, before they were demanded of text"
)
ISSUE = "https://github.com/huggingface/transformers/pull/45454"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether images are attended to in both directions."""
    return bidirectional_images(model)


_answers: dict[Any, bool] = {}  # by the function that makes the masks


def demands_ids_of_text(model: nn.Module) -> bool:
    """Whether the class makes no training mask without ids, tried on one token of text."""
    maker: Any = getattr(inspect.getmodule(type(unwrap(model))), "create_causal_mask_mapping", None)
    if maker is None or "is_training" not in inspect.signature(maker).parameters:
        return False
    if maker not in _answers:
        token = torch.zeros(1, 1, text_config(model).hidden_size)
        config = unwrap(model).config
        try:
            maker(config, token, None, None, torch.zeros(1, 1).long(), is_training=True)
            _answers[maker] = False
        except ValueError:
            _answers[maker] = True
    return _answers[maker]


def _text_ids(kwargs: dict[str, Any]) -> Tensor | None:
    """Zeros (B, S) for the tokens or embeddings of a forward."""
    given = kwargs.get("input_ids")
    if given is None:
        given = kwargs.get("inputs_embeds")
    if not isinstance(given, Tensor):
        return None
    return torch.zeros(given.shape[:2], dtype=torch.long, device=given.device)


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Refuse images without modality ids; supply text's, zeros, where the class demands them."""
    needed = type_id_name(model)
    assert needed is not None
    owner = type(model).__name__

    demanded = demands_ids_of_text(model)

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = [name for name in IMAGE_INPUT_NAMES if kwargs.get(name) is not None]
        if given and kwargs.get(needed) is None:
            raise Refused(
                f"{given[0]} without {needed}: {owner} would attend to the image causally;"
                " let the collator make the modality ids"
            )
        if demanded and module.training and kwargs.get(needed) is None and not args:
            return args, {**kwargs, needed: _text_ids(kwargs)}
        return None

    return body(model).register_forward_pre_hook(hook, with_kwargs=True).remove
