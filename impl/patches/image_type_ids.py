"""An image without its modality ids is silently attended to causally."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import Refused
from ..model_facts import IMAGE_INPUT_NAMES, bidirectional_images, body, type_id_name
from ..training_plan import TrainingPlan

REASON = (
    "since transformers 5.6 the modality ids are optional, but they decide which positions attend"
    " in both directions: relative logit differences of 0.4 to 0.8, without a word"
)
ISSUE = "https://github.com/huggingface/transformers/pull/45454"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether images are attended to in both directions."""
    return bidirectional_images(model)


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Refuse a forward with image features and without modality ids."""
    needed = type_id_name(model)
    assert needed is not None
    owner = type(model).__name__

    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = [name for name in IMAGE_INPUT_NAMES if kwargs.get(name) is not None]
        if given and kwargs.get(needed) is None:
            raise Refused(
                f"{given[0]} without {needed}: {owner} would attend to the image causally;"
                " let the collator make the modality ids"
            )

    return body(model).register_forward_pre_hook(hook, with_kwargs=True).remove
