"""The loss: fused or not, softcap, the auxiliary loss of the router."""

from __future__ import annotations

from .errors import Refused
from .plan_draft import Draft

CUT_CROSS_ENTROPY = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"


def takes_auxiliary_loss(draft: Draft) -> bool:
    """Whether the class's load-balancing loss is asked for, by the user or the config, and is
    there."""
    experts, asked = draft.traits.experts, draft.wish("auxiliary_loss")
    wanted = bool(draft.traits.wants_auxiliary_loss if asked is None else asked)
    return wanted and experts is not None and experts.auxiliary_loss


def decide_auxiliary_loss(draft: Draft) -> bool:
    """`output_router_logits`: only where the class turns it into a loss (L10); Refused
    elsewhere.
    """
    experts, asked = draft.traits.experts, draft.wish("auxiliary_loss")
    available = experts is not None and experts.auxiliary_loss
    if asked and experts is None:
        raise Refused(f"auxiliary_loss: {draft.traits.model_type} has no experts to balance")
    if asked and not available:
        raise Refused(
            f"auxiliary_loss: {draft.traits.model_type} has no load-balancing loss; its router"
            " logits are probabilities or are not returned, so asking for it would do nothing"
        )
    wanted = bool(draft.traits.wants_auxiliary_loss if asked is None else asked)
    if wanted and not available:
        draft.warn("output_router_logits in the config is ignored: the class has no auxiliary loss")
    value = takes_auxiliary_loss(draft)
    if experts is None:
        draft.decide("output_router_logits", None, "no experts")
    elif not available:
        why = "the class has no load-balancing loss; asking for it would silently do nothing"
        draft.decide("output_router_logits", False, why, "auxiliary-loss")
    else:
        why = "asked for" if value else "off by default in every published config"
        draft.decide("output_router_logits", value, f"{why}; the class adds coefficient × loss")
    return value


def decide_fused_loss(draft: Draft, auxiliary: bool, adapted_head: bool) -> bool:
    """Whether the loss is computed from hidden states and head without the logits."""
    if draft.setting.kernels != "on":
        draft.decide("cut_cross_entropy", None, "kernels are not asked for")
        return False
    traits = draft.traits
    obstacle = ""
    if traits.cls is None or not traits.cls.lm_head:
        obstacle = "the head is not known to be a plain linear layer"
    elif traits.logit_scale:
        obstacle = f"`{traits.logit_scale}` scales the logits in a way of this model's own"
    elif adapted_head:
        obstacle = "an adapter on the head would be ignored by the fused loss"
    elif auxiliary:
        obstacle = "the class adds its auxiliary loss in its own forward"
    if obstacle:
        draft.warn(f"the fused cross-entropy is left out: {obstacle}")
        draft.decide("cut_cross_entropy", False, obstacle, "fused-loss-heads")
        return False
    cap = f", softcap {traits.softcap:g} included" if traits.softcap else ""
    if draft.setting.dtype == "bfloat16":
        draft.decide("cut_cross_entropy", True, f"loss without materialising the logits{cap}")
    else:
        why = f"axolotl's plugin needs bf16; the reference's own fused loss runs in any dtype{cap}"
        draft.decide("cut_cross_entropy", False, why, "fused-loss-dtype")
    return True
