"""Kernels for the experts, and what excludes what."""

from __future__ import annotations

from .errors import ConfigError, Refused
from .plan_draft import Draft
from .plan_loss import CUT_CROSS_ENTROPY
from .traits import ExpertFacts

KERNELS = "axolotl.integrations.kernels.KernelsPlugin"
BUILTIN = ("eager", "batched_mm", "grouped_mm")
IMPLEMENTATIONS = (*BUILTIN, "scattermoe", "sonicmoe", "deepgemm")


def decide_kernels(draft: Draft) -> str | None:
    """`use_kernels`, `use_scattermoe`, `experts_implementation`; returns the last.

    Refused: two expert kernels at once, a kernel flag that contradicts the implementation, sonicmoe
    on an activation it would not use, an implementation without a backward.
    """
    _exclusions(draft)
    experts = draft.traits.experts
    asked = draft.wish("experts_implementation")
    wants = draft.setting.kernels == "on" or bool(draft.wish("use_scattermoe"))
    wants = (wants and asked in (None, "scattermoe")) or asked == "scattermoe"
    if experts is None:
        _no_experts(draft, asked)
        return None
    obstacle = _obstacle(draft, experts) if wants else ""
    if wants and obstacle:
        if asked == "scattermoe" or draft.wish("use_scattermoe"):
            raise Refused(f"scattermoe: {obstacle}")
        draft.warn(f"the experts kernel is left out: {obstacle}")
    if wants and not obstacle:
        why = f"{len(experts.layers)} layers of {experts.num} experts, {experts.layout} weights"
        draft.decide("use_kernels", True, f"kernels asked for: {why}")
        draft.decide("use_scattermoe", True, f"experts and their LoRA in one kernel: {why}")
        draft.decide("use_sonicmoe", None, "excluded by use_scattermoe")
        reason = "must equal the kernel flag, or axolotl falls back to eager with a warning"
        draft.decide("experts_implementation", "scattermoe", reason, "router-detection")
        return "scattermoe"
    return _without_kernel(draft, experts, asked, obstacle)


def _exclusions(draft: Draft) -> None:
    asked = draft.wish("experts_implementation")
    scatter, sonic = draft.wish("use_scattermoe"), draft.wish("use_sonicmoe")
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise ConfigError(
            f"experts_implementation is {asked!r}; it is one of {', '.join(IMPLEMENTATIONS)}"
        )
    if scatter and sonic:
        raise Refused("use_scattermoe and use_sonicmoe exclude one another; set one")
    for flag, name in ((scatter, "scattermoe"), (sonic, "sonicmoe")):
        if flag and asked not in (None, name):
            raise Refused(
                f"use_{name} with experts_implementation: {asked}: they exclude one another"
            )
    if draft.wish("use_kernels") is False and (scatter or sonic):
        raise Refused("use_kernels: false excludes use_scattermoe and use_sonicmoe")
    if asked == "deepgemm":
        raise Refused("experts_implementation: deepgemm has no backward pass in bf16")
    experts = draft.traits.experts
    if experts and (sonic or asked == "sonicmoe"):
        read = experts.activation if experts.activation_key == "hidden_act" else "silu"
        if read != experts.activation or read not in ("silu", "gelu", "relu"):
            raise Refused(
                f"sonicmoe reads `hidden_act`, which this config lacks, and would run {read}"
                f" instead of {experts.activation}; use scattermoe or grouped_mm"
                if read != experts.activation
                else f"sonicmoe knows silu, gelu and relu, not {experts.activation}"
            )


def _no_experts(draft: Draft, asked: str | None) -> None:
    wanted = asked or draft.wish("use_scattermoe") or draft.wish("use_sonicmoe")
    if wanted:
        raise Refused("an experts kernel was asked for, but the model has no routed experts")
    for name in ("use_kernels", "use_scattermoe", "use_sonicmoe", "experts_implementation"):
        draft.decide(name, None, "no routed experts")


def _obstacle(draft: Draft, experts: ExpertFacts) -> str:
    """Why the fused kernel cannot run these experts ("": it can)."""
    if draft.traits.cls is None:
        return "the class is unknown, and so is the layout of its experts"
    if experts.layout != "fused":
        return f"the experts are {experts.layout}; the kernel takes weights (E, 2I, H), gate first"
    return experts.obstacle and f"the kernel does not run {experts.obstacle}"


def _without_kernel(
    draft: Draft, experts: ExpertFacts, asked: str | None, obstacle: str
) -> str | None:
    why = obstacle or ("kernels are not asked for" if not asked else f"{asked} was asked for")
    sonic = asked == "sonicmoe" or bool(draft.wish("use_sonicmoe"))
    draft.decide("use_kernels", sonic, why)
    draft.decide("use_scattermoe", False, why)
    draft.decide("use_sonicmoe", sonic or None, "asked for" if sonic else why)
    if experts.layout == "modules":
        reason = "each expert is a module of its own; there is no implementation to choose"
        draft.decide("experts_implementation", None, reason)
        return None
    if sonic:
        draft.decide("experts_implementation", "sonicmoe", "asked for; the activation agrees")
        return "sonicmoe"
    if draft.setting.dtype == "float64" and asked in (None, "grouped_mm", "scattermoe"):
        if asked:
            draft.warn(f"experts_implementation {asked} became eager: it refuses float64")
        reason = "grouped_mm refuses float64; eager is the oracle's form"
        draft.decide("experts_implementation", "eager", reason)
        return "eager"
    value = asked or "grouped_mm"
    reason = "asked for" if asked else "the default of transformers: one grouped product"
    draft.decide("experts_implementation", value, reason)
    return value


def decide_plugins(draft: Draft) -> None:
    """`plugins`: exactly those whose keys are set."""
    chosen = []
    if draft.decisions["cut_cross_entropy"].value:
        chosen.append(CUT_CROSS_ENTROPY)
    if draft.decisions["use_kernels"].value:
        chosen.append(KERNELS)
    why = "one for each key that needs it" if chosen else "no key needs one"
    draft.decide("plugins", chosen or None, why)
