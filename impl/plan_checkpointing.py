"""Activation checkpointing and offloading: which form, and where the reentrant one is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError, Refused
from .plan_draft import Draft
from .plan_loss import takes_auxiliary_loss

OFFLOAD = {"off": None, "on": True, "legacy": "legacy", "disk": "disk"}
MODES = (True, False, "legacy", "disk", "hidden_states")


def decide_offload(draft: Draft) -> bool | str | None:
    """`activation_offloading`: None, True, "legacy", "disk" or "hidden_states" (parallel.md §7)."""
    mode = OFFLOAD.get(draft.setting.offload, draft.setting.offload)
    mode = draft.wish("activation_offloading", mode)
    if mode not in (None, *MODES):
        raise ConfigError(
            f"activation_offloading is {mode!r}; it is one of true, false, legacy, disk,"
            " hidden_states"
        )
    if not mode:
        draft.decide(
            "activation_offloading", False, "not asked for; activations stay on the device"
        )
        return None
    how = {
        True: "every saved tensor goes to pinned host memory on a side stream",
        "legacy": "every saved tensor goes to host memory, without a side stream",
        "disk": "every saved tensor goes to disk",
        "hidden_states": "only layer inputs are offloaded; layers are recomputed",
    }
    draft.decide("activation_offloading", mode, f"asked for: {how[mode]}")
    assert isinstance(mode, bool | str)
    return mode


def decide_checkpointing(draft: Draft, offload: bool | str | None) -> Mapping[str, Any] | None:
    """`gradient_checkpointing` and its kwargs; returns what `prepare` applies (None: nothing).

    Refused: layer-input offloading in its reentrant form on a model that shares keys and values.
    """
    wanted = draft.setting.checkpointing
    asked = draft.wish("gradient_checkpointing_kwargs")
    reentrant = wanted == "reentrant" if asked is None else bool(asked.get("use_reentrant", False))
    on = wanted != "off" or asked is not None
    if offload == "hidden_states":
        if reentrant and draft.traits.kv_sharing:
            raise Refused(
                "activation_offloading: hidden_states with use_reentrant: true: layers that share"
                " keys and values would get wrong gradients; use use_reentrant: false"
            )
        if not on:
            draft.warn("activation_offloading: hidden_states recomputes, so checkpointing is on")
        on = True
    if not on:
        _off(draft, offload)
        return None
    why, deviation = _why_not_reentrant(draft)
    if reentrant and why:
        draft.warn(f"use_reentrant: true was asked for and changed to false: {why}")
    value = reentrant and not why
    reason = why or _default_reason(draft, reentrant)
    kwargs = {**(asked or {}), "use_reentrant": value}
    draft.decide("gradient_checkpointing", True, "asked for: layers are recomputed in the backward")
    draft.decide("gradient_checkpointing_kwargs", kwargs, reason, deviation)
    return kwargs


def _off(draft: Draft, offload: bool | str | None) -> None:
    traits = draft.traits
    if offload:
        why = (
            "axolotl takes activation_offloading only with this key, and then turns its own"
            " checkpointing off; nothing is recomputed here"
        )
        draft.decide("gradient_checkpointing", True, why, "offload-key")
    else:
        draft.decide("gradient_checkpointing", False, "not asked for")
    if traits.kv_sharing or traits.multimodal:
        why = "set although checkpointing is off, so that turning it on cannot pick the wrong form"
        draft.decide("gradient_checkpointing_kwargs", {"use_reentrant": False}, why)
    else:
        draft.decide("gradient_checkpointing_kwargs", None, "checkpointing is off")


def _why_not_reentrant(draft: Draft) -> tuple[str, str | None]:
    """Why the reentrant form is not used here ("": it would be right), and the deviation."""
    traits = draft.traits
    if traits.kv_sharing:
        first = min(traits.kv_source)
        return (
            f"layers from {first} on reuse keys and values of earlier layers: reentrant"
            " checkpointing detaches them and gives wrong gradients with the right loss, on one"
            " device too"
        ), "reentrant"
    if takes_auxiliary_loss(draft):
        return (
            "the auxiliary loss is taken of router logits that the first reentrant pass records"
            " without their history: it would be in the loss and in no gradient"
        ), "reentrant"
    if draft.find_unused:
        return (
            "DDP looks for unused parameters, and with reentrant checkpointing it fails: 'Expected"
            " to mark a variable ready only once'"
        ), "reentrant"
    if traits.multimodal:
        return (
            "the specification's value for multimodal models; cautious here: the reentrant form is"
            " exact on one device, but fails as soon as DDP must look for unused parameters"
        ), "reentrant"
    return "", None


def _default_reason(draft: Draft, reentrant: bool) -> str:
    if not reentrant:
        return "the safe form, and the default of transformers"
    extra = "; inputs must require gradients for the adapters" if draft.adapters else ""
    return f"asked for; right here: no shared keys and values, no unused parameters{extra}"
