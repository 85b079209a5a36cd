"""An auxiliary loss that is asked for takes effect or is refused."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import Refused
from ..model_facts import is_moe, text_config
from ..training_plan import TrainingPlan

REASON = (
    "gemma4 accepts output_router_logits and returns probabilities, without adding any loss;"
    " elsewhere the coefficient alone does nothing"
)
ISSUE = "https://github.com/huggingface/transformers/issues/44242"


def applies_to(model: nn.Module, plan: TrainingPlan) -> bool:
    """Whether the plan or the configuration asks for a load-balancing loss."""
    asked = plan.auxiliary_loss or bool(getattr(text_config(model), "output_router_logits", False))
    return asked and (plan.auxiliary_loss or is_moe(model))


def apply(model: nn.Module, plan: TrainingPlan) -> Callable[[], None]:
    """Switch the router logits on, so that the loss sees them; Refused where there is no loss."""
    config = text_config(model)
    if not is_moe(model):
        raise Refused(f"{type(model).__name__} has no experts, so no load-balancing loss")
    if not hasattr(config, "router_aux_loss_coef"):
        raise Refused(
            f"{type(model).__name__} has no load-balancing loss; its router logits are"
            " probabilities. Train without the auxiliary loss"
        )
    before = getattr(config, "output_router_logits", False)
    config.output_router_logits = True

    def undo() -> None:
        config.output_router_logits = before

    return undo
