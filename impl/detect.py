"""A model config → `Traits`: facts by what the config and its class say, never by a family's
name.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from . import detect_config as read
from .errors import ConfigError
from .traits import ClassFacts, ExpertFacts, Traits


def detect(config: Any, auto_class: str | None = None) -> Traits:
    """The traits of a model config.

    config: a transformers config, a dict, the path of a `config.json` or of its folder, or `Traits`
    (returned as they are). auto_class: the auto class that will load it; by default the one whose
    mapping has the model type, the multimodal ones first (so a `gemma4` config gives
    `Gemma4ForConditionalGeneration`, as `AutoModelForCausalLM` does too: families.md §6).
    A `model_type` that transformers lacks is described by its fields alone (`known` is False).
    Raises ConfigError, one line, for what cannot be read or describes no decoder language model.
    """
    if isinstance(config, Traits):
        return config
    fields, known = read.load_fields(config)
    if fields.get("is_encoder_decoder"):
        raise ConfigError(f"{fields.get('model_type')}: encoder-decoder models are not planned for")
    text = read.text_fields(fields)
    sizes = read.check_sizes(text if known is None else {**read.derived_sizes(known), **text})
    traits = _from_fields(fields, text, sizes)
    if known is None:
        note = f"model_type {traits.model_type!r} is unknown to the installed transformers"
        return replace(traits, notes=(f"{note}; the facts are those of the config's fields",))
    facts, note = _class_facts(known, fields, auto_class, sizes["num_hidden_layers"])
    return _with_class(traits, text, facts, (note,) if note else ())


def _from_fields(fields: read.Fields, text: read.Fields, sizes: dict[str, int]) -> Traits:
    count = sizes["num_hidden_layers"]
    types = read.layer_types(text, count)
    vision, audio = read.has_part(fields, "vision"), read.has_part(fields, "audio")
    bidirectional = text.get("use_bidirectional_attention")
    mixing = ("linear", "mamba", "recurrent", "conv", "ssm")
    return Traits(
        model_type=str(fields.get("model_type") or "unknown"),
        known=False,
        hidden_size=sizes["hidden_size"],
        num_layers=count,
        vocab_size=sizes["vocab_size"],
        heads=sizes.get("num_attention_heads", 1),
        kv_heads=read.kv_head_counts(fields, text),
        head_width=read.head_width(text, sizes),
        layer_types=types,
        vision=vision,
        audio=audio,
        multimodal=vision or audio,
        window=read.window(text, types),
        kv_source=MappingProxyType(read.shared_kv(text, types)),
        per_layer_inputs=int(text.get("hidden_size_per_layer_input") or 0),
        linear_layers=tuple(i for i, t in enumerate(types) if any(word in t for word in mixing)),
        tied_embeddings=bool(fields.get("tie_word_embeddings", text.get("tie_word_embeddings"))),
        softcap=_number(text.get("final_logit_softcapping")),
        attention_softcap=_number(text.get("attn_logit_softcapping")),
        logit_scale=next((k for k in read.LOGIT_SCALE_KEYS if text.get(k) not in (None, 1)), ""),
        bidirectional="sliding" if vision and bidirectional == "vision" else "",
        attention_k_eq_v=bool(text.get("attention_k_eq_v")) and "full_attention" in types,
        bypassed=("altup.correction_coefs",) if text.get("altup_coef_clip") is not None else (),
        experts=read.experts(text),
        wants_auxiliary_loss=bool(text.get("output_router_logits")),
        dtype=str(fields.get("dtype") or fields.get("torch_dtype") or "") or None,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value else None


def _class_facts(
    config: Any, fields: read.Fields, auto_class: str | None, layers: int
) -> tuple[ClassFacts, str]:
    from . import detect_class

    chosen = auto_class or detect_class.auto_class_for(config)
    if auto_class is not None and not detect_class.loads(auto_class, config):
        raise ConfigError(f"{config.model_type}: {auto_class} has no model for this config")
    if chosen is None:
        raise ConfigError(
            f"{config.model_type}: transformers has no decoder language model for this model_type"
        )
    try:
        key = json.dumps(fields, sort_keys=True, default=str)
    except TypeError:  # keys that do not sort
        key = repr(fields)
    return _cached(_Keyed(key, config), chosen, layers)


class _Keyed:
    """A config that is equal to another when its content is."""

    def __init__(self, key: str, config: Any) -> None:
        self.key, self.config = (type(config).__name__, key), config

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key


@lru_cache(maxsize=64)
def _cached(keyed: _Keyed, auto_class: str, layers: int) -> tuple[ClassFacts, str]:
    from .detect_class import class_facts

    return class_facts(keyed.config, auto_class, layers)


def _with_class(
    traits: Traits, text: read.Fields, cls: ClassFacts, notes: tuple[str, ...]
) -> Traits:
    """The config's facts, corrected by what the class really builds."""
    type_ids = next((n for n in ("mm_token_type_ids", "token_type_ids") if n in cls.forward), None)
    multimodal = bool(cls.components) and traits.multimodal
    bidirectional = traits.bidirectional
    if traits.vision and cls.reads_type_ids and not bidirectional:
        bidirectional = "all"  # the argument is there for the image mask, on every layer
    sources = dict(traits.kv_source)
    for layer in cls.keyless:  # queries without keys: this layer borrows them from an earlier one
        same = [i for i in range(layer) if i not in cls.keyless]
        alike = [i for i in same if traits.layer_types[i] == traits.layer_types[layer]]
        if layer not in sources and same:
            sources[layer] = (alike or same)[-1]
    return replace(
        traits,
        known=True,
        multimodal=multimodal or _wraps(cls),
        vision=traits.vision and bool({"pixel_values", "images"} & cls.forward),
        audio=traits.audio and bool({"input_features", "audio_values"} & cls.forward),
        kv_source=MappingProxyType(sources),
        linear_layers=tuple(sorted({*traits.linear_layers, *cls.recurrent})),
        tied_embeddings=cls.tied,
        bidirectional=bidirectional if type_ids else "",
        type_ids=type_ids,
        experts=_merge_experts(traits.experts, cls, text),
        cls=cls,
        notes=notes,
    )


def _wraps(cls: ClassFacts) -> bool:
    """Whether the class takes pictures or sound, even when this config has no tower for them."""
    return bool({"pixel_values", "input_features"} & cls.forward)


def _merge_experts(
    said: ExpertFacts | None, cls: ClassFacts, text: read.Fields
) -> ExpertFacts | None:
    built = cls.experts
    if built is None:
        return None  # every layer is dense, whatever the fields say
    top_k = said.top_k if said else 1
    return replace(
        built,
        top_k=top_k,
        activation=said.activation if said and said.activation else built.activation,
        activation_key=said.activation_key if said else "",
        auxiliary_loss="output_router_logits" in cls.forward and "router_aux_loss_coef" in text,
    )
