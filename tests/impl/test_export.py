"""Exports: YAML that axolotl reads, arguments that transformers and PEFT take, JSON with
reasons.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from typing import Any

import peft
import pytest
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.checkpoint import available, build_config
from conformance.families import MODELS
from conformance.settings import DIMENSIONS, Setting
from conformance.strategies import STRATEGIES
from impl import export
from impl.detect import detect
from impl.deviations import BY_KEY, ROWS
from impl.errors import Refused
from impl.export_yaml import scalar
from impl.plan import plan

# Field names of axolotl's config schema and of its plugins' (main of 2026-07-24), those used here.
AXOLOTL = {
    "base_model",
    "processor_type",
    "skip_prepare_dataset",
    "remove_unused_columns",
    "sample_packing",
    "train_on_inputs",
    "freeze_mm_modules",
    "chat_template",
    "adapter",
    "load_in_4bit",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_linear",
    "lora_target_parameters",
    "lora_modules_to_save",
    "peft_use_rslora",
    "ddp",
    "ddp_find_unused_parameters",
    "fsdp",
    "fsdp_config",
    "dp_shard_size",
    "dp_replicate_size",
    "tensor_parallel_size",
    "context_parallel_size",
    "activation_offloading",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "use_kernels",
    "experts_implementation",
    "plugins",
    "attn_implementation",
    "bf16",
    "float32",
    "overrides_of_model_config",
    "datasets",
    "micro_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "output_dir",
    "use_scattermoe",
    "use_sonicmoe",
    "quantize_moe_experts",
    "cut_cross_entropy",
    "expert_parallel_size",
}
# In no release of axolotl: the specification's key, ignored there (families.md §1 row 1).
IGNORED = {"normalize_weight_scales"}
NAMES = sorted(name for name, m in MODELS.items() if available(m) is None)
SETTINGS = st.builds(Setting, **{k: st.sampled_from(list(v)) for k, v in DIMENSIONS.items()})


def make(name: str, setting: str, strategy: str = "single", **wishes: Any) -> Any:
    """The plan of a model of the suite."""
    return plan(build_config(MODELS[name]), Setting.parse(setting), strategy, **wishes)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.sampled_from(NAMES), SETTINGS, st.sampled_from(sorted(STRATEGIES)))
def test_every_plan_exports(name: str, setting: Setting, strategy: str) -> None:
    """YAML reads back as the config it came from, with known keys; JSON and arguments too."""
    try:
        found = plan(build_config(MODELS[name]), setting, strategy)
    except Refused:
        return
    config = export.to_axolotl(found)
    assert yaml.safe_load(export.to_yaml(found)) == config
    assert set(config) <= AXOLOTL | IGNORED
    body = json.loads(export.to_json(found))
    for key, decision in found.decisions.items():
        assert body[key]["reason"] == decision.reason
    assert export.to_args_text(found)
    assert export.explain(found) or not any(d.deviation for d in found.decisions.values())
    if find_spec("axolotl"):
        from axolotl.utils.schemas.config import AxolotlInputConfig

        AxolotlInputConfig(**config)


@given(st.one_of(st.text(max_size=20), st.integers(), st.booleans(), st.none()))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_scalars_read_back(value: Any) -> None:
    """Any scalar survives YAML, regexes and words such as `no` included."""
    text = scalar(value)
    if isinstance(value, str) and not value.isprintable():
        return
    assert yaml.safe_load(f"key: {text}") == {"key": value}


@pytest.mark.parametrize("value", ["no", "1e3", "0x1f", "2026-01-01", "a: b", "- x", "~", "#c", ""])
def test_tricky_scalars(value: str) -> None:
    """Strings that look like something else stay strings."""
    assert yaml.safe_load(f"key: {scalar(value)}") == {"key": value}


def test_arguments_are_taken() -> None:
    """The classes named take the arguments given for them."""
    for setting, strategy in (("bf16+qlora+ckpt-nonreentrant+accum", "fsdp2"), ("-", "tp_ep")):
        args = export.to_args(make("qwen3_moe", setting, strategy))
        fields = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
        assert set(args["TrainingArguments"]) <= fields
        if "LoraConfig" in args:
            peft.LoraConfig(**args["LoraConfig"])
            transformers.BitsAndBytesConfig(**args["BitsAndBytesConfig"])
        if strategy == "tp_ep":
            assert args["DistributedConfig"] == {"tp_size": 2, "tp_plan": "auto", "ep_size": 2}


def test_expert_parallel_names_both_sizes() -> None:
    """The form that works (L8): never `enable_expert_parallel` alone."""
    args = export.to_args(make("mixtral", "-", "fsdp2_ep"))["DistributedConfig"]
    assert args == {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}


def test_a_ring_that_cannot_take_the_heads_is_said() -> None:
    """axolotl's context parallel is FlashAttention's, which ends at heads of 256."""
    found = make("gemma4-moe", "-", "cp")
    wide = dataclasses.replace(found, traits=dataclasses.replace(found.traits, head_width=512))
    narrow = dataclasses.replace(found, traits=dataclasses.replace(found.traits, head_width=256))
    assert "# ! axolotl cannot train this" in export.to_yaml(wide)
    assert "cannot train" not in export.to_yaml(narrow)


def test_deviations_are_complete() -> None:
    """Every row says what, why and on which versions; keys are unique and all in use."""
    for row in ROWS:
        for field in dataclasses.fields(row):
            if field.name not in ("key", "same_value"):
                assert getattr(row, field.name), (row.topic, field.name)
    keys = [row.key for row in ROWS if row.key]
    assert len(keys) == len(set(keys))
    used = set()
    for name in NAMES:
        traits = detect(build_config(MODELS[name]))
        for setting in ("bf16+lora-experts+images+kernels", "kernels+offload", "packed",
                        "lora+ckpt-reentrant", "offload", "fp64+images"):  # fmt: skip
            for strategy in STRATEGIES:
                try:
                    text = "+".join(sorted(setting.split("+"), key=_order))
                    made = plan(traits, Setting.parse(text), strategy)
                except Refused:
                    continue
                used |= {d.deviation for d in made.decisions.values() if d.deviation}
    used |= {
        d.deviation for d in make("mixtral", "bf16+kernels", auxiliary_loss=True).decisions.values()
    }
    assert set(BY_KEY) <= used


def _order(token: str) -> int:
    tokens = [t for values in DIMENSIONS.values() for t in values.values() if t]
    return tokens.index(token)


def test_explain_names_the_decisions() -> None:
    """The explanation of a plan holds the rows that bear on it, with the values here."""
    text = export.explain(make("gemma4-e2b", "ckpt-reentrant", "ddp"))
    assert "gradient_checkpointing_kwargs = {'use_reentrant': False}" in text
    assert "56 of 95" in text
    assert export.explain().count("specification:") == len(ROWS)
