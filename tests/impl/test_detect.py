"""Detection: facts by what a config and its class say, for every family and for unseen ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from conformance.case import Model
from conformance.checkpoint import available, build_config
from conformance.families import MODELS
from impl.detect import detect
from impl.errors import ConfigError

BUILDABLE = [model for model in MODELS.values() if available(model) is None]
PUBLISHED = sorted(
    (Path(__file__).parents[2] / "fixtures" / "published").glob("*.json"), key=lambda p: p.name
)
UNSEEN = {
    "model_type": "orchid",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "hidden_act": "silu",
    "final_logit_softcapping": 20.0,
    "hidden_size_per_layer_input": 8,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("model", BUILDABLE, ids=lambda m: m.name)
def test_families(model: Model) -> None:
    """Traits, class, layers, unit and frozen parts of every model of the suite."""
    traits = detect(build_config(model))
    assert traits.names == model.traits
    assert traits.cls is not None
    assert traits.cls.name == model.model_class
    assert traits.layers == model.layers
    assert traits.layer_class == model.wrap_class
    assert set(traits.components) == set(model.freeze)
    if model.images:
        assert traits.type_ids == model.images.type_ids


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_published(path: Path) -> None:
    """The published sizes are detected from the file, with the traits of the tiny model."""
    twins = [m for m in BUILDABLE if m.published == path.stem and "_text" not in m.config_class]
    found = detect(path)
    assert found.known
    assert found.hidden_size >= 1000
    for twin in twins:
        if "Text" not in twin.config_class or "text_config" not in json.loads(path.read_text()):
            assert found.names == twin.traits, twin.name


def test_gemma4_config_gives_the_multimodal_class() -> None:
    """families.md §6: by either auto class a gemma4 config gives the wrapper, a text one does
    not.
    """
    config = build_config(MODELS["gemma4-dense"])
    for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        facts = detect(config, auto).cls
        assert facts is not None
        assert facts.name == "Gemma4ForConditionalGeneration"
        assert facts.layers == "model.language_model.layers"
    text = detect(config.get_text_config()).cls
    assert text is not None
    assert (text.name, text.layers) == ("Gemma4ForCausalLM", "model.layers")


def test_shared_kv_by_type() -> None:
    """A consumer borrows from the last producer of its own layer type."""
    source = detect(UNSEEN).kv_source
    assert dict(source) == {4: 2, 5: 3}
    e2b = detect(build_config(MODELS["gemma4-e2b"]))
    assert e2b.kv_source
    for consumer, producer in e2b.kv_source.items():
        assert producer not in e2b.kv_source
        assert e2b.layer_types[producer] == e2b.layer_types[consumer]
        assert (
            e2b.layer_types[producer + 1 : min(e2b.kv_source)].count(e2b.layer_types[consumer]) == 0
        )


def test_unseen_by_fields() -> None:
    """A model type that transformers lacks is described by its fields, and says so."""
    traits = detect(UNSEEN)
    assert not traits.known
    assert traits.cls is None
    assert "orchid" in traits.notes[0]
    assert traits.experts is not None
    assert (traits.experts.num, traits.experts.top_k, traits.experts.width) == (8, 2, 24)
    wanted = {"moe", "kv_sharing", "sliding_window", "softcap", "per_layer_inputs"}
    assert traits.names == wanted | {"tied_embeddings"}


def test_unseen_class() -> None:
    """A class that a user registers is detected by what it builds, whatever it is called."""
    from transformers.models.llama import modeling_llama

    class OrchidConfig(transformers.LlamaConfig):
        model_type = "orchid_registered"

    class OrchidForCausalLM(modeling_llama.LlamaForCausalLM):
        config_class = OrchidConfig

    transformers.AutoConfig.register("orchid_registered", OrchidConfig)
    transformers.AutoModelForCausalLM.register(OrchidConfig, OrchidForCausalLM)
    try:
        size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
        config = OrchidConfig(num_attention_heads=4, intermediate_size=48, **size)
        facts = detect(config).cls
    finally:
        transformers.CONFIG_MAPPING._extra_content.pop("orchid_registered")
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(OrchidConfig)
    assert facts is not None
    assert facts.name == "OrchidForCausalLM"
    assert facts.layer_classes == ("LlamaDecoderLayer",)


@pytest.mark.parametrize(
    ("name", "traits", "path", "layout"),
    [
        ("DeepseekV3Config", {"moe", "shared_expert"}, "mlp.experts", "fused"),
        ("Glm4MoeConfig", {"moe", "shared_expert"}, "mlp.experts", "fused"),
        (
            "GptOssConfig",
            {"moe", "auxiliary_loss", "sliding_window"},
            "mlp.experts",
            "transposed",
        ),
    ],
)
def test_other_families(name: str, traits: set[str], path: str, layout: str) -> None:
    """Models that no file of the suite knows: experts, layout, the layers that have them."""
    found = detect(getattr(transformers, name)())
    assert found.names == traits
    assert found.experts is not None
    assert (found.experts.path, found.experts.layout) == (path, layout)
    assert len(found.experts.layers) <= found.num_layers


def test_connectors_of_other_names() -> None:
    """What lies beside the language model is found by the class, not by a list of prefixes."""
    found = detect(transformers.Idefics3Config(), None)
    assert found.vision
    assert "connector" in found.components
    assert not any(part in found.layers for part in found.components)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "hidden_size"),
        ({"hidden_size": 8, "num_hidden_layers": 2}, "vocab_size"),
        (UNSEEN | {"hidden_size": -4}, "hidden_size"),
        (UNSEEN | {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        (UNSEEN | {"vocab_size": "many"}, "vocab_size"),
        (UNSEEN | {"num_key_value_heads": 3}, "multiple"),
        (UNSEEN | {"num_experts_per_tok": 9}, "experts"),
        ({"model_type": "mixtral", "num_hidden_layers": 0}, "num_hidden_layers"),
        ({"model_type": "mixtral", "hidden_size": "x"}, "hidden_size"),
        ({"model_type": "mixtral", "num_experts_per_tok": 99}, "experts"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "vit"}, "vocab_size"),
        ({"model_type": "gemma4", "text_config": {"layer_types": ["a"]}}, "gemma4"),
        (3, "int"),
    ],
)
def test_broken(config: Any, says: str) -> None:
    """Nonsense is one clear line."""
    with pytest.raises(ConfigError) as caught:
        detect(config)
    text = str(caught.value)
    assert says in text
    assert "\n" not in text
    assert len(text) < 500


def test_config_is_left_alone() -> None:
    """Detection changes neither a config object nor a dict."""
    config = build_config(MODELS["gemma4-moe"])
    before = config.to_dict()
    detect(config)
    assert config.to_dict() == before
    fields = dict(UNSEEN)
    detect(fields)
    assert fields == UNSEEN
