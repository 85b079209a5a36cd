"""LoRA specifications: the same words mean the same parts in every family, or are said not to."""

from __future__ import annotations

import re
from typing import Any

import pytest
import transformers
from torch import nn

from conformance.checkpoint import available, build_config
from conformance.families import MODELS
from conformance.settings import Setting
from impl.detect import detect
from impl.detect_class import meta_model
from impl.errors import Refused
from impl.lora_targets import ALL_LINEAR, ROUTED_EXPERTS, WRAPPER, default_regex, resolve
from impl.plan import plan

NAMES = [f"{leaf}_proj" for leaf in ("q", "k", "v", "o", "gate", "up", "down")]
BUILDABLE = {name: m for name, m in MODELS.items() if available(m) is None}
MOE = [name for name, m in BUILDABLE.items() if "moe" in m.traits]
LORA = Setting.parse("lora")


def meta(name: str) -> tuple[Any, nn.Module]:
    """The traits and the meta-device model of a model of the suite."""
    config = build_config(MODELS[name])
    traits = detect(config)
    assert traits.cls is not None
    return traits, meta_model(config, traits.cls.auto_class)


@pytest.mark.parametrize("name", BUILDABLE)
def test_regex_matches_under_wrappers(name: str) -> None:
    """The default regex matches the same modules with a checkpoint wrapper on every layer."""
    traits, model = meta(name)
    regex, excluded = default_regex(traits)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = [n for n in linear if re.fullmatch(regex, n)]
    assert found
    wrapped = [re.sub(r"(layers\.\d+\.)", rf"\1{WRAPPER}", n) for n in found]
    assert all(re.fullmatch(regex, n) for n in wrapped)
    assert not any(set(n.split(".")) & set(traits.components) for n in found)
    assert not any(n.endswith(tuple(excluded)) for n in found if excluded)
    assert all(reason for reason in excluded.values())


@pytest.mark.parametrize("name", BUILDABLE)
@pytest.mark.parametrize("spec", [NAMES, ["q_proj", "v_proj"], ALL_LINEAR])
def test_plan_and_resolution_agree(name: str, spec: Any) -> None:
    """The regex that a plan emits for a list selects exactly what `resolve` lists."""
    traits, model = meta(name)
    found = plan(traits, LORA, "single", lora_target_modules=spec).lora
    assert found is not None
    want = resolve(spec, model, traits)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    got = [n for n in linear if found.target_modules and re.fullmatch(found.target_modules, n)]
    assert sorted(got) == sorted(want.modules)
    weights = {n for n, _ in model.named_parameters()}
    ends = tuple(f".{target}" for target in found.target_parameters)
    assert {n for n in weights if ends and n.endswith(ends)} == set(want.parameters)


@pytest.mark.parametrize("name", MOE)
def test_expert_leaves_reach_experts_or_warn(name: str) -> None:
    """Names of expert projections adapt the routed experts, or a warning says that they do not."""
    traits, model = meta(name)
    for spec in (NAMES, ["q_proj", "w1", "w2", "w3"]):
        found = resolve(spec, model, traits)
        assert found.parameters or any("routed expert" in text for text in found.warnings)
    both = resolve(["q_proj", ROUTED_EXPERTS], model, traits)
    assert len(both.parameters) == 2 * len(traits.experts.layers)
    assert not both.warnings


def test_towers_and_bypassed_weights() -> None:
    """Towers are left out unless asked for, then the layer inside the wrapper is meant."""
    traits, model = meta("gemma4-moe")
    found = resolve(["q_proj", "v_proj"], model, traits)
    assert not any("vision_tower" in n for n in found.modules)
    assert any("vision_tower" in n for n in found.excluded)
    inside = resolve(["q_proj"], model, traits, towers=True).modules
    towers = [n for n in inside if "vision_tower" in n]
    assert towers
    assert all(n.endswith("q_proj.linear") for n in towers)
    _, gemma3n = meta("gemma3n")
    left = resolve(ALL_LINEAR, gemma3n)
    assert not any("correction_coefs" in n for n in left.modules)
    assert any("correction_coefs" in n for n in left.excluded)


def test_refusals() -> None:
    """What would adapt nothing, or drop where nothing can, is refused."""
    config = build_config(MODELS["gemma4-text"])
    spec = r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down)_proj"
    with pytest.raises(Refused, match=r"model\.layers"):
        plan(config, LORA, "single", lora_target_modules=spec)
    with pytest.raises(Refused, match="names no module"):
        plan(config, LORA, "single", lora_target_modules=["c_attn"])
    with pytest.raises(Refused, match="no routed experts"):
        plan(config, Setting.parse("lora-experts"), "single")
    experts = build_config(MODELS["mixtral"])
    with pytest.raises(Refused, match="dropout"):
        plan(experts, Setting.parse("lora-experts"), "single", lora_dropout=0.1)
    with pytest.raises(Refused, match="names no expert weight"):
        plan(experts, LORA, "single", lora_target_parameters=["experts.w9"])
    with pytest.raises(Refused, match="towers"):
        plan(build_config(MODELS["gemma4-moe"]), LORA, "single", adapt_towers=True)
    _, model = meta("mixtral")
    with pytest.raises(Refused, match="matches nothing"):
        resolve(["nothing"], model)


def test_adapted_towers_with_images() -> None:
    """With images the towers can be adapted, and then they are not frozen."""
    config, setting = build_config(MODELS["gemma4-moe"]), Setting.parse("lora+images")
    wishes: dict[str, Any] = {"adapt_towers": True, "lora_target_modules": ["q_proj"]}
    found = plan(config, setting, "single", **wishes)
    assert found.freeze == ()
    assert found.lora is not None
    tower = "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"
    assert re.fullmatch(found.lora.target_modules or "", tower)


def test_unseen_class_by_the_same_rules() -> None:
    """Shared experts and compressed attention of a class without a family file are adapted."""
    regex, excluded = default_regex(detect(transformers.DeepseekV3Config()))
    for name in ("mlp.shared_experts.up_proj", "self_attn.kv_b_proj", "mlp.down_proj"):
        assert re.fullmatch(regex, f"model.layers.7.{name}")
    assert not any("shared" in name for name in excluded)
    gpt2, _ = default_regex(detect(transformers.GPT2Config()))
    assert re.fullmatch(gpt2, "transformer.h.3.attn.c_attn")
