"""Planning: the specification's values where they are right, refusals where nothing would be."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.checkpoint import available, build_config
from conformance.families import MODELS
from conformance.fidelity import published_config
from conformance.settings import DIMENSIONS, Setting
from conformance.strategies import STRATEGIES
from impl.deviations import BY_KEY
from impl.errors import ConfigError, Refused
from impl.plan import plan
from impl.training_plan import TrainingPlan
from tests.impl.test_detect import UNSEEN

KEYS = [
    "processor_type",
    "skip_prepare_dataset",
    "remove_unused_columns",
    "sample_packing",
    "freeze_mm_modules",
    "chat_template",
    "lora_target_modules",
    "lora_target_linear",
    "lora_target_parameters",
    "plugins",
    "use_kernels",
    "use_scattermoe",
    "experts_implementation",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "ddp",
    "ddp_find_unused_parameters",
    "activation_offloading",
    "fsdp",
    "fsdp_config",
    "fsdp_version",
    "fsdp_transformer_layer_cls_to_wrap",
    "normalize_weight_scales",
    "adapter",
    "lora_r",
    "lora_alpha",
    "load_in_4bit",
    "bf16",
    "cut_cross_entropy",
    "output_router_logits",
]
SPECIFIED = (
    r"model.language_model.layers.[\d]+.(_checkpoint_wrapped_module.)?"
    r"(mlp|self_attn).(up|down|gate|q|k|v|o)_proj"
)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def make(name: str, setting: str = "-", strategy: str = "single", **wishes: Any) -> TrainingPlan:
    """The plan of a model of the suite."""
    return plan(build_config(MODELS[name]), Setting.parse(setting), strategy, **wishes)


def refusal(*args: str, **wishes: Any) -> str:
    """The message with which a plan is refused: one line."""
    with pytest.raises(Refused) as caught:
        make(*args, **wishes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_key_of_the_specification() -> None:
    """A plan decides every key, whether or not it has a value."""
    found = make("gemma4-moe", "bf16+lora-experts+ckpt-nonreentrant+kernels", "fsdp2")
    assert set(KEYS) <= set(found.decisions)


def test_gemma4_as_specified() -> None:
    """The specification's own example, value for value."""
    found = make("gemma4-moe", "bf16+lora-experts+ckpt-nonreentrant+images+kernels", "fsdp2")
    wanted: dict[str, Any] = {
        "processor_type": "AutoProcessor",
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "freeze_mm_modules": True,
        "chat_template": "gemma4",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "lora_target_modules": SPECIFIED,
        "lora_target_parameters": EXPERTS,
        "plugins": [
            "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
            "axolotl.integrations.kernels.KernelsPlugin",
        ],
        "use_kernels": True,
        "use_scattermoe": True,
        "experts_implementation": "scattermoe",
        "fsdp": ["full_shard", "auto_wrap"],
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "Gemma4TextDecoderLayer",
        },
    }
    assert {key: found[key] for key in wanted} == wanted


def test_qwen_weight_scales_as_specified() -> None:
    """Recurrent layers beside routed experts get the specification's rule, no others do."""
    rule = [{"name_pattern": r"linear_attn\.conv1d\.weight", "threshold": 1.3}]
    assert make("qwen3_5_moe")["normalize_weight_scales"] == rule
    assert make("qwen3_5")["normalize_weight_scales"] is None
    assert make("mixtral")["normalize_weight_scales"] is None


@pytest.mark.parametrize("name", ["mixtral", "gemma4-text"])
def test_text_models_are_regular(name: str) -> None:
    """A text model gets no VLM key and looks for no unused parameter."""
    found = make(name, "-", "ddp")
    assert found["processor_type"] is None
    assert found["freeze_mm_modules"] is None
    assert found["ddp_find_unused_parameters"] is False


@pytest.mark.parametrize("name", ["gemma4-e2b", "gemma3n"])
@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_shared_kv_is_never_reentrant(name: str, strategy: str) -> None:
    """Over an explicit wish, on one device too, and said."""
    found = make(name, "ckpt-reentrant", strategy)
    assert found.checkpointing == {"use_reentrant": False}
    assert any("reentrant" in text for text in found.warnings)
    wish = {"use_reentrant": True}
    assert make(name, gradient_checkpointing_kwargs=wish).checkpointing == {"use_reentrant": False}


def test_reentrant_where_it_is_right() -> None:
    """An explicit wish is kept on text models without shared keys and values; VLMs stay
    cautious.
    """
    kept = make("mixtral", "ckpt-reentrant", "ddp")
    assert kept.checkpointing == {"use_reentrant": True}
    assert not kept.warnings
    assert make("gemma4-dense", "ckpt-reentrant").checkpointing == {"use_reentrant": False}
    assert make("gemma3-vlm", "ckpt-reentrant").checkpointing == {"use_reentrant": False}


def test_offload_modes() -> None:
    """Layer-input offloading recomputes, and its reentrant form is refused with shared K/V."""
    assert "use_reentrant: false" in refusal("gemma4-e2b", "ckpt-reentrant+offload-hidden_states")
    implied = make("mixtral", "offload-hidden_states")
    assert implied.checkpointing == {"use_reentrant": False}
    assert implied.warnings
    plain = make("mixtral", "offload-disk")
    assert (plain.offload, plain.checkpointing) == ("disk", None)
    assert plain["gradient_checkpointing"] is True  # axolotl's schema demands it


@pytest.mark.parametrize("name", ["gemma4-moe", "gemma3-vlm", "qwen3_5"])
def test_ddp_matrix(name: str) -> None:
    """parallel.md §3: unfed towers are frozen or looked for; offloading and looking exclude."""
    assert make(name, "-", "ddp").find_unused_parameters is True
    assert make(name, "offload", "ddp").find_unused_parameters is False
    thawed = make(name, "-", "ddp", freeze_mm_modules=False)
    assert thawed.freeze == ()
    assert thawed.find_unused_parameters is True
    options: dict[str, Any] = {"freeze_mm_modules": False}
    assert "freeze_mm_modules: true" in refusal(name, "offload", "ddp", **options)
    options["ddp_find_unused_parameters"] = False
    assert "finished reduction" in refusal(name, "-", "ddp", **options)
    assert make(name, "-", "ddp", ddp_find_unused_parameters=False).find_unused_parameters is False


def test_fsdp1_with_adapters_counts_bytes() -> None:
    """The refusal says what is stored and what is trained; full fine-tuning is planned."""
    said = refusal("gemma4-moe", "lora", "fsdp1")
    assert "fsdp2" in said
    assert "bytes" in said
    assert make("gemma4-moe", "-", "fsdp1")["fsdp_version"] == 1


def test_fsdp_unit() -> None:
    """A unit that is no layer of the class is refused with the right one named."""
    said = refusal(
        "gemma4-moe", "-", "fsdp2", fsdp_transformer_layer_cls_to_wrap="Gemma4DecoderLayer"
    )
    assert "Gemma4TextDecoderLayer" in said
    assert make("gemma3-vlm", "-", "hsdp").wrap_classes == ("Gemma3DecoderLayer",)


@pytest.mark.parametrize(
    ("name", "wishes", "says"),
    [
        ("gemma4-moe", {"use_scattermoe": True, "use_sonicmoe": True}, "exclude"),
        ("mixtral", {"use_scattermoe": True, "experts_implementation": "eager"}, "exclude"),
        ("mixtral", {"use_kernels": False, "use_scattermoe": True}, "excludes"),
        ("gemma4-moe", {"experts_implementation": "sonicmoe"}, "hidden_act"),
        ("gemma4-moe", {"use_sonicmoe": True}, "hidden_act"),
        ("mixtral", {"experts_implementation": "deepgemm"}, "backward"),
        ("gemma4-dense", {"use_scattermoe": True}, "no routed experts"),
        ("gemma4-moe", {"auxiliary_loss": True}, "no load-balancing loss"),
        ("gemma4-dense", {"auxiliary_loss": True}, "no experts"),
    ],
)
def test_kernel_exclusions(name: str, wishes: dict[str, Any], says: str) -> None:
    """What excludes what, and what would silently do nothing."""
    assert says in refusal(name, "bf16", **wishes)


def test_sonicmoe_where_it_reads_the_activation() -> None:
    """With `hidden_act` in the config sonicmoe runs the right gate and is granted."""
    found = make("mixtral", "bf16", experts_implementation="sonicmoe")
    assert found.experts_implementation == "sonicmoe"
    assert found["use_sonicmoe"] is True


def test_kernels_by_layout() -> None:
    """The kernel is left out, with a warning, where the weights have another layout."""
    found = plan(transformers.GptOssConfig(), Setting.parse("bf16+kernels"), "single")
    assert found["use_scattermoe"] is False
    assert any("experts kernel" in text for text in found.warnings)
    assert found.experts_implementation == "grouped_mm"
    assert make("mixtral", "fp64").experts_implementation == "eager"
    assert make("gemma4-dense", "bf16+kernels")["plugins"] == [
        "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
    ]


def test_four_bit() -> None:
    """Linear layers alone are not the model: expert weights are quantised too, and that is said."""
    moe = make("gemma4-moe", "bf16+qlora")
    assert (moe["adapter"], moe["load_in_4bit"], moe["quantize_moe_experts"]) == (
        "qlora",
        True,
        True,
    )
    assert moe.lora is not None
    assert moe.lora.quantize_4bit
    assert make("gemma4-dense", "bf16+qlora")["quantize_moe_experts"] is None
    assert make("gemma4-moe", "bf16+lora")["load_in_4bit"] is False


def test_fused_loss() -> None:
    """Fused for a known head in any dtype; not with an adapted head nor an auxiliary loss."""
    assert make("gemma4-e2b", "kernels").fused_loss
    assert make("gemma4-e2b", "kernels")["cut_cross_entropy"] is False  # the plugin needs bf16
    saved = make("mixtral", "bf16+lora+kernels", lora_modules_to_save=["lm_head"])
    assert not saved.fused_loss
    assert not make("mixtral", "bf16+kernels", auxiliary_loss=True).fused_loss
    scaled = plan(transformers.CohereConfig(), Setting.parse("bf16+kernels"), "single")
    assert not scaled.fused_loss


def test_packing() -> None:
    """Text packs without the mask, images do not, and recurrences only where they can be told."""
    packed = make("gemma4-moe", "packed")
    assert packed.pack
    assert packed["processor_type"] is None
    assert "attention_mask" not in packed.forward_inputs
    assert "position_ids" in packed.forward_inputs
    assert "images" in refusal("gemma3-vlm", "images", sample_packing=True)
    flash = {"sample_packing": True, "attn_implementation": "flash_attention_2"}
    assert "2-D" in refusal("gemma3-vlm", "-", **flash)
    assert "document-aware" in make("qwen3_5", "packed").decisions["sample_packing"].reason
    with pytest.raises(Refused, match="state along the row"):
        plan(transformers.FalconH1Config(), Setting.parse("packed"), "single")
    assert not make("mixtral", "packed", sample_packing=False).pack


def test_heads_that_flash_attention_does_not_take() -> None:
    """Refused where some layer's heads are wider than 256, as published Gemma 4's are."""
    config = published_config(MODELS["gemma4-text"])
    bf16, flash = Setting.parse("bf16"), {"attn_implementation": "flash_attention_2"}
    with pytest.raises(Refused, match="at most 256, and this model's widest have 512"):
        plan(config, bf16, "single", **flash)
    narrow = plan(published_config(MODELS["mixtral"]), bf16, "single", **flash)
    assert narrow.attn_implementation == "flash_attention_2"


def test_reentrant_checkpoints_and_the_auxiliary_loss() -> None:
    """The loss would have no gradient; without it the reentrant form is kept."""
    reentrant = make("mixtral", "ckpt-reentrant")
    assert reentrant.checkpointing == {"use_reentrant": True}
    changed = make("mixtral", "ckpt-reentrant", auxiliary_loss=True)
    assert changed.checkpointing == {"use_reentrant": False}
    assert any("no gradient" in text for text in changed.warnings)


def test_ranks_by_pattern() -> None:
    """Patterns reach the LoRA plan and the count of what trains; nonsense is refused."""
    names = {"lora_rank_pattern": {"experts.gate_up_proj": 8}}
    chosen = make("mixtral", "lora-experts", **names)
    assert chosen.lora is not None
    assert chosen.lora.rank_of("model.layers.0.mlp.experts.gate_up_proj") == 8
    assert chosen.lora.rank_of("model.layers.0.mlp.experts.down_proj") == chosen.lora.r
    assert chosen["lora_rank_pattern"] == {"experts.gate_up_proj": 8}
    for wrong in ({"experts": 0}, {"experts": "8"}, {"(": 8}):
        with pytest.raises(ConfigError, match="lora_alpha_pattern"):
            make("mixtral", "lora-experts", lora_alpha_pattern=wrong)


def test_images() -> None:
    """Image batches carry what the class takes; a model without vision refuses them."""
    inputs = make("gemma4-moe", "images").forward_inputs
    assert {"pixel_values", "image_position_ids", "mm_token_type_ids"} <= set(inputs)
    assert "image_grid_thw" in make("qwen3_5", "images").forward_inputs
    assert "token_type_ids" in make("gemma3-vlm", "images").forward_inputs
    assert "takes none" in refusal("mixtral", "images")


def test_model_parallel() -> None:
    """Sizes that do not divide are refused before a rank starts; dense expert plans are noted."""
    assert "no routed experts" in refusal("gemma4-dense", "-", "tp_ep")
    assert "divide" in refusal("mixtral", "-", "tp", ranks=3)
    assert "divide" in refusal("mixtral", "-", "fsdp2_ep", ranks=4)
    assert "even" in refusal("mixtral", "-", "hsdp", ranks=3)
    found = make("gemma4-moe", "-", "fsdp2_ep")
    assert found["expert_parallel_size"] == 2
    assert found.decisions["expert_parallel_size"].deviation == "expert-plan"
    assert make("mixtral", "-", "hsdp", ranks=8)["dp_shard_size"] == 4


def test_unseen_config() -> None:
    """An unknown model type is planned by its traits; what needs the class is refused."""
    found = plan(UNSEEN, Setting.parse("lora+ckpt-reentrant"), "single")
    assert found.checkpointing == {"use_reentrant": False}
    assert any("orchid" in text for text in found.warnings)
    with pytest.raises(Refused, match="orchid"):
        plan(UNSEEN, Setting(), "fsdp2")
    named = plan(UNSEEN, Setting(), "fsdp2", fsdp_transformer_layer_cls_to_wrap="OrchidLayer")
    assert named["fsdp_transformer_layer_cls_to_wrap"] == "OrchidLayer"
    deepseek = plan(transformers.DeepseekV3Config(), Setting.parse("bf16+lora-experts"), "fsdp2")
    assert deepseek["lora_target_parameters"] == EXPERTS
    assert deepseek.wrap_classes == ("DeepseekV3DecoderLayer",)


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"lora_r": 0}, "lora_r"),
        ({"lora_r": True}, "lora_r"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_dropout": 2.0}, "lora_dropout"),
        ({"ranks": 0}, "ranks"),
        ({"experts_implementation": "magic"}, "magic"),
        ({"activation_offloading": "tape"}, "tape"),
        ({"lora_target_modules": "("}, "regex"),
        ({"sample_packing": "yes"}, "sample_packing"),
    ],
)
def test_bad_options(wishes: dict[str, Any], says: str) -> None:
    """A mistaken option is one line that names it."""
    with pytest.raises(ConfigError, match=says):
        make("mixtral", "lora", "single", **wishes)


def test_bad_strategy() -> None:
    """An unknown strategy names the known ones."""
    with pytest.raises(ConfigError, match="fsdp2"):
        make("mixtral", "-", "zero4")


CONFIGS = {n: build_config(m) for n, m in MODELS.items() if available(m) is None}
ZOO = ("DeepseekV3Config", "Glm4MoeConfig", "GptOssConfig", "LlamaConfig", "MambaConfig")
CONFIGS |= {n: getattr(transformers, n)() for n in (*ZOO, "Llama4Config", "GPT2Config")}
CONFIGS["orchid"] = UNSEEN
SETTINGS = st.builds(Setting, **{k: st.sampled_from(list(v)) for k, v in DIMENSIONS.items()})


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), SETTINGS, st.sampled_from(sorted(STRATEGIES)))
def test_any_combination(name: str, setting: Setting, strategy: str) -> None:
    """Every combination is planned with reasons or refused in one line; never another error."""
    try:
        found = plan(CONFIGS[name], setting, strategy)
    except Refused as error:
        assert str(error)
        assert "\n" not in str(error)
        return
    for key, decision in found.decisions.items():
        assert decision.reason.strip(), key
        assert decision.deviation is None or decision.deviation in BY_KEY, key
    assert found.checkpointing is None or "use_reentrant" in found.checkpointing
    reentrant = (found.checkpointing or {}).get("use_reentrant")
    assert not (reentrant and (found.traits.kv_sharing or found.find_unused_parameters))
    assert not (found.pack and found.train_on_images)
    assert plan(CONFIGS[name], setting, strategy).decisions == found.decisions
