"""What a batch is: processor, packing, chat template, and what stays frozen for want of input."""

from __future__ import annotations

from .errors import Refused
from .label_rules import LabelRules
from .plan_draft import Draft

# Names of axolotl's chat templates that are also a model line; others use their tokenizer's.
TEMPLATES = (
    "gemma4_unified",
    "gemma4",
    "gemma3n",
    "gemma3",
    "qwen3_5",
    "qwen3",
    "qwen2_vl",
    "llama4",
    "pixtral",
    "llava",
    "falcon_h1",
    "nemotron_h",
    "deepseek_v3",
    "deepseek_v2",
    "exaone4",
)
# Arguments of `forward` that go with `pixel_values` where the class has them.
IMAGE_EXTRAS = (
    "image_position_ids",
    "image_grid_thw",
    "image_sizes",
    "pixel_attention_mask",
    "pixel_mask",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "spatial_shapes",
)


def decide_data(draft: Draft) -> None:
    """Processor keys, packing, chat template (the specification's VLM quick start and its tree)."""
    draft.images = draft.setting.batch == "images"
    if draft.images and not draft.traits.vision:
        raise Refused(f"{draft.traits.model_type}: a batch with images, but the model takes none")
    draft.pack = _packing(draft)
    multimodal = draft.traits.multimodal
    if multimodal and not draft.pack:
        why = "the model takes images or sound: the specification's four lines for every VLM"
        cost = "" if draft.images else "; cautious for text alone, which could be tokenized once"
        draft.decide("processor_type", "AutoProcessor", f"{why}{cost}")
        draft.decide("skip_prepare_dataset", True, f"the collator runs the processor: {why}{cost}")
        draft.decide(
            "remove_unused_columns", False, f"image columns must reach the collator: {why}"
        )
    else:
        why = (
            "packed rows of text go through the tokenizer, not the processor"
            if multimodal
            else "a text model: its tokenizer is enough"
        )
        deviation = "vlm-text-packing" if multimodal else None
        draft.decide("processor_type", None, why, deviation)
        draft.decide("skip_prepare_dataset", False, f"{why}; data are tokenized once", deviation)
        draft.decide("remove_unused_columns", None, f"{why}; the loader's default is right")
    _chat_template(draft)
    _labels(draft)


def _packing(draft: Draft) -> bool:
    traits, asked = draft.traits, draft.wish("sample_packing")
    pack = draft.setting.batch == "packed" if asked is None else bool(asked)
    if asked is False and draft.setting.batch == "packed":
        draft.warn(
            "sample_packing: false was asked for, so rows are not packed as the setting says"
        )
    if not pack:
        why = "not asked for"
        if traits.multimodal:
            why = "off for every VLM (specification): packed images are isolated by no stock class"
        draft.decide("sample_packing", False, why)
        return False
    if draft.images:
        raise Refused(
            "sample_packing with images: image blocks and positions of packed samples are not kept"
            " apart; train images unpacked or text packed"
        )
    attention = draft.wish("attn_implementation", "")
    if traits.multimodal and attention.startswith("flash"):
        raise Refused(
            f"sample_packing with {attention} on a multimodal class: its position ids are not 2-D,"
            " so packed documents are not isolated; use sdpa or eager"
        )
    why, deviation = _isolation(draft)
    if traits.multimodal:
        why = f"text only, measured exact with sdpa and eager: {why}"
        deviation = deviation or "vlm-text-packing"
    draft.decide("sample_packing", True, why, deviation)
    return True


def _isolation(draft: Draft) -> tuple[str, str | None]:
    """How packed documents are kept apart; Refused where nothing can."""
    traits = draft.traits
    if not traits.linear_layers:
        return "position ids restart and the attention mask is dropped", "packing-mask"
    if traits.cls is None or not traits.cls.delta_rule:
        raise Refused(
            f"sample_packing on {traits.model_type}: {len(traits.linear_layers)} layers carry a"
            " state along the row, and no document-aware form of theirs is known; train unpacked"
        )
    return (
        f"position ids restart, the mask is dropped, and the {len(traits.linear_layers)} recurrent"
        " layers get the document-aware patch (unpatched they leak: L4)"
    ), "packing-recurrent"


def _chat_template(draft: Draft) -> None:
    name = draft.traits.model_type
    asked = draft.wish("chat_template")
    if asked is not None:
        draft.decide("chat_template", asked, "as asked for")
        return
    if not draft.traits.multimodal:
        draft.decide("chat_template", None, "a text model: the data's own template is used")
        return
    match = next((t for t in TEMPLATES if name == t or name.startswith(f"{t}_")), None)
    if match:
        draft.decide("chat_template", match, f"the template of the {match} models (specification)")
    else:
        why = "no template is named after this model; the tokenizer carries its own"
        draft.decide("chat_template", "tokenizer_default", why)


def _labels(draft: Draft) -> None:
    """`train_on_inputs`, `roles_to_train`, `train_on_eos`: what of a conversation is labelled."""
    why = {
        "train_on_inputs": "questions are read, not learnt",
        "roles_to_train": "the assistant's turns alone, media apart",
        "train_on_eos": "with their stop tokens: a model that never learns one never stops",
    }
    values = {
        name: draft.wish(name, getattr(LabelRules, name))
        for name in ("train_on_inputs", "roles_to_train", "train_on_eos")
    }
    rules = LabelRules(**{**values, "roles_to_train": tuple(values["roles_to_train"])})
    nothing = not rules.train_on_inputs and not rules.roles_to_train
    if nothing and rules.train_on_eos in ("turn", "none"):
        raise Refused("roles_to_train: [] without train_on_inputs: no token would train")
    if rules.train_on_inputs and draft.wish("roles_to_train"):
        draft.warn("roles_to_train says nothing beside train_on_inputs: true; every role trains")
    for name, value in values.items():
        value = list(value) if name == "roles_to_train" else value
        draft.decide(name, value, "as asked for" if draft.wish(name) is not None else why[name])


def decide_freeze(draft: Draft) -> None:
    """`freeze_mm_modules`: everything beside the language model, by what the class has."""
    traits, asked = draft.traits, draft.wish("freeze_mm_modules")
    if not traits.multimodal:
        if asked:
            draft.warn(
                "freeze_mm_modules was asked for, but the model has nothing beside its text part"
            )
        draft.decide("freeze_mm_modules", None, "no module beside the language model")
        draft.decide("frozen_modules", [], "no module beside the language model")
        return
    parts = ", ".join(traits.components) or "none in this config"
    if asked is False:
        draft.decide("freeze_mm_modules", False, f"as asked for; {parts} are trained too")
        draft.decide("frozen_modules", [], "as asked for")
        return
    draft.freeze = traits.components
    if not draft.images:
        why = "training on text alone: these would get no gradient"
    elif draft.adapters:
        why = "the adapters are on the language model only"
    else:
        why = "cautious, as in the specification's VLM example; the cost: towers do not learn"
    draft.decide("freeze_mm_modules", True, f"{why} ({parts})", "freeze-by-class")
    reason = "every module of the class beside the language model"
    draft.decide("frozen_modules", list(draft.freeze), reason, "freeze-by-class")


def forward_inputs(draft: Draft) -> tuple[str, ...]:
    """`forward_inputs`: what a batch must carry, by the setting and the signature of `forward`."""
    found = ["input_ids", "labels"]
    if draft.setting.batch in ("padded", "images"):
        found.append("attention_mask")
    if draft.pack:
        found = [name for name in found if name != "attention_mask"]
        found.append("position_ids")
    if draft.images:
        arguments = draft.traits.cls.forward if draft.traits.cls else frozenset()
        found.append("pixel_values")
        found += [name for name in IMAGE_EXTRAS if name in arguments]
        if draft.traits.type_ids:
            found.append(draft.traits.type_ids)
    why = "arguments of the class's forward that this setting needs"
    if draft.images and draft.traits.type_ids:
        why += "; without type ids the image mask is silently causal, or positions are wrong"
    draft.decide("forward_inputs", list(found), why, "type-ids" if draft.images else None)
    return tuple(found)
