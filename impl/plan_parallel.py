"""How the training is spread: DDP, FSDP, tensor, expert and context parallel keys, and refusals."""

from __future__ import annotations

from .errors import Refused
from .plan_draft import Draft
from .plan_lora import trainable
from .training_plan import LoraPlan

FSDP_KEYS = ("fsdp", "fsdp_config", "fsdp_version", "fsdp_transformer_layer_cls_to_wrap")


def unused_sources(draft: Draft) -> list[str]:
    """Why some trainable parameters may get no gradient in a step ([]: none may)."""
    traits, found = draft.traits, []
    thawed = [part for part in traits.components if part not in draft.freeze]
    if thawed and not draft.adapters:
        fed = (
            "may stay unfed (a rank without images, a pooling head)"
            if draft.images
            else "are unfed"
        )
        found.append(f"{', '.join(thawed)} {fed}")
    experts = traits.experts
    if experts and experts.layout == "modules" and not draft.adapters:
        found.append("experts that no token reaches have no gradient: each is a module of its own")
    return found


def decide_ddp(draft: Draft) -> bool:
    """`ddp` and `ddp_find_unused_parameters` (parallel.md §3); returns the latter.

    Refused: an explicit false, or activation offloading, where parameters stay unused.
    """
    if draft.strategy != "ddp":
        draft.decide("ddp", None, f"the strategy is {draft.strategy}")
        draft.decide("ddp_find_unused_parameters", None, "only DDP looks for unused parameters")
        return draft.strategy == "cp" and bool(
            unused_sources(draft)
        )  # its gradients go through DDP
    draft.decide("ddp", True, "the strategy")
    unused, asked = unused_sources(draft), draft.wish("ddp_find_unused_parameters")
    because = "; ".join(unused)
    if unused and asked is False:
        raise Refused(
            f"ddp_find_unused_parameters: false, but {because}: DDP would stop with 'Expected to"
            " have finished reduction'; set it to true or freeze_mm_modules: true"
        )
    if draft.setting.offload != "off" or draft.wish("activation_offloading"):
        return _ddp_with_offload(draft, because, bool(asked))
    if unused:
        value, why, row = True, because, "find-unused"
    elif draft.traits.multimodal:
        value, row = True, "find-unused"
        why = (
            "the specification's value for multimodal models; cautious, since all else is frozen:"
            " the cost is one walk over the graph a step"
        )
    else:
        value, why, row = False, "every trainable parameter gets a gradient in every step", None
    if asked is not None:
        value, why, row = asked, "as asked for", None
    draft.decide("ddp_find_unused_parameters", value, why, row)
    return value


def _ddp_with_offload(draft: Draft, unused: str, asked: bool) -> bool:
    if unused:
        raise Refused(
            f"activation offloading under DDP, but {unused}: looking for unused parameters"
            " conflicts with offload wrappers, and not looking fails; set freeze_mm_modules: true"
        )
    if asked:
        draft.warn(
            "ddp_find_unused_parameters: true was changed to false under activation offloading"
        )
    why = "skipped under activation offloading (specification); right, as nothing is left unused"
    draft.decide("ddp_find_unused_parameters", False, why, "find-unused-offload")
    return False


def decide_fsdp(draft: Draft, lora: LoraPlan | None) -> tuple[str, ...]:
    """Every `fsdp*` key; returns the decoder layer classes, which FSDP makes its units and context
    parallel cuts at.

    Refused: FSDP1 with adapters (the bytes of its gradients), FSDP2 with trained towers, a unit
    that is no layer of the model.
    """
    if not draft.fsdp:
        for name in FSDP_KEYS:
            draft.decide(name, None, f"the strategy is {draft.strategy}")
        return draft.traits.cls.layer_classes if draft.traits.cls else ()
    if draft.strategy == "fsdp1" and lora is not None:
        raise Refused(_fsdp1_bytes(draft, lora))
    if draft.strategy in ("fsdp2", "hsdp") and lora is None:
        _refuse_unfed_towers(draft)
    classes = _units(draft)
    version = 1 if draft.strategy == "fsdp1" else 2
    names = ",".join(classes)
    draft.decide(
        "fsdp", ["full_shard", "auto_wrap"], "parameters sharded, one unit a decoder layer"
    )
    why = {1: "asked for: flat parameters, full fine-tuning only", 2: "each parameter is sharded"}
    row = "fsdp1-adapters" if version == 1 else None
    draft.decide("fsdp_version", version, why[version], row)
    draft.decide("fsdp_transformer_layer_cls_to_wrap", names, _unit_reason(draft), "fsdp-unit")
    config = {
        "fsdp_version": version,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": names,
    }
    draft.decide("fsdp_config", config, "version, policy and unit as decided above")
    return classes


def _refuse_unfed_towers(draft: Draft) -> None:
    thawed = [part for part in draft.traits.components if part not in draft.freeze]
    if thawed:
        raise Refused(
            f"{draft.strategy} with {', '.join(thawed)} trained: a rank whose batch has no image"
            " has no gradient for them, and FSDP2 reduces on each rank what that rank has, so the"
            " ranks' buffers differ in size and training fails or hangs (Automodel#2566); set"
            " freeze_mm_modules: true, or use ddp"
        )


def _units(draft: Draft) -> tuple[str, ...]:
    traits, asked = draft.traits, draft.wish("fsdp_transformer_layer_cls_to_wrap")
    if traits.cls is None:
        if asked:
            return (asked,)
        raise Refused(
            f"{draft.strategy}: the class of {traits.model_type!r} is unknown, and so is its"
            " decoder layer; name it in fsdp_transformer_layer_cls_to_wrap"
        )
    built = traits.cls.layer_classes
    if asked is None:
        return built
    wanted = tuple(part.strip() for part in asked.split(",") if part.strip())
    stray = [name for name in wanted if name not in built]
    if stray or not wanted:
        raise Refused(
            f"fsdp_transformer_layer_cls_to_wrap: {asked} is no decoder layer of {traits.cls.name};"
            f" its layers are {', '.join(built)}"
        )
    return wanted


def _unit_reason(draft: Draft) -> str:
    cls = draft.traits.cls
    if cls is None:
        return "as asked for"
    others = [name for name in cls.no_split if name not in cls.layer_classes]
    text = f"the class of {cls.layers} in {cls.name}"
    if others:
        text += f"; `_no_split_modules` also lists {', '.join(others)}, absent or frozen here"
    return text


def _fsdp1_bytes(draft: Draft, lora: LoraPlan) -> str:
    """Why FSDP1 is refused with adapters: bytes of gradients it would store (parallel.md §6)."""
    cls = draft.traits.cls
    if cls is None:
        return "fsdp1 with adapters stores gradients of frozen weights too; use fsdp2"
    size = 2 if draft.setting.dtype == "bfloat16" else 8 if draft.setting.dtype == "float64" else 4
    flat, own = cls.numel * size, max(trainable(draft.traits, lora), 1) * size
    return (
        f"fsdp1 with adapters: gradients of the flat parameters cover frozen weights too, {flat:,}"
        f" bytes over all ranks for {own:,} bytes that are trained ({flat / own:,.0f} ×); use fsdp2"
    )


def decide_model_parallel(draft: Draft) -> None:
    """Tensor, expert, context and data sizes (axolotl's keys), checked against the model's own
    plan.

    Refused: experts asked of a dense model, heads or experts that do not divide, a missing plan.
    """
    sizes: dict[str, int | None] = dict.fromkeys(
        ("dp_replicate_size", "dp_shard_size", "tensor_parallel_size", "expert_parallel_size",
         "context_parallel_size")
    )  # fmt: skip
    n, strategy = draft.ranks, draft.strategy
    if strategy in ("tp", "tp_ep"):
        sizes["tensor_parallel_size"] = n
        _check_tensor_parallel(draft)
    if strategy in ("tp_ep", "fsdp2_ep"):
        sizes["expert_parallel_size"] = n
        _check_expert_parallel(draft)
    if strategy in ("fsdp2", "fsdp2_ep"):
        sizes["dp_shard_size"] = n
    if strategy == "hsdp":
        if n % 2 or n < 4:
            raise Refused(f"hsdp: {n} ranks; it takes an even number, at least 4")
        sizes |= {"dp_replicate_size": 2, "dp_shard_size": n // 2}
    if strategy == "cp":
        sizes["context_parallel_size"] = n
    reasons = {
        "dp_replicate_size": "copies of the sharded model",
        "dp_shard_size": "ranks that share one copy of the parameters",
        "tensor_parallel_size": "by the model's own tensor-parallel plan",
        "expert_parallel_size": "local experts are E / ranks; checked after loading",
        "context_parallel_size": "the sequence is split; keys and values are gathered",
    }
    rows = {"context_parallel_size": "context-parallel"}
    if _dense_in_ep(draft):
        rows["expert_parallel_size"] = "expert-plan"
    for name, value in sizes.items():
        if value:
            draft.decide(name, value, reasons[name], rows.get(name))
        else:
            draft.decide(name, None, f"the strategy is {strategy}")


def _check_tensor_parallel(draft: Draft) -> None:
    traits, n = draft.traits, draft.ranks
    if traits.cls is not None and not any("layers" in key for key in traits.cls.tp_plan):
        raise Refused(f"{draft.strategy}: {traits.cls.name} has no tensor-parallel plan")
    uneven = [count for count in (traits.heads, *traits.kv_heads) if count % n]
    if uneven:
        raise Refused(
            f"{draft.strategy}: {uneven[0]} heads do not divide by {n} ranks (heads {traits.heads},"
            f" key/value heads {', '.join(map(str, traits.kv_heads))}); a shape error otherwise"
        )


def _check_expert_parallel(draft: Draft) -> None:
    experts, n = draft.traits.experts, draft.ranks
    if experts is None:
        raise Refused(
            f"{draft.strategy}: {draft.traits.model_type} has no routed experts to spread"
        )
    if experts.num % n:
        raise Refused(f"{draft.strategy}: {experts.num} experts do not divide by {n} ranks")
    if draft.traits.cls is not None and not draft.traits.cls.ep_plan:
        raise Refused(f"{draft.strategy}: {draft.traits.cls.name} has no expert-parallel plan here")


def _dense_in_ep(draft: Draft) -> bool:
    """Whether the class's expert plan also shards modules that are no experts (L9)."""
    cls = draft.traits.cls
    return cls is not None and any("experts" not in key for key in cls.ep_plan)
