"""Bugs of adapters: P01 to P15."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.mutants import mutant
from tests.mutants.mutants_forward import around, drop_patch

LAYER = "peft.tuners.lora.layer"


def after_attaching(patch: pytest.MonkeyPatch, change: Any) -> None:
    """`change(model)` on every model that the reference has just adapted."""

    def make(original: Any) -> Any:
        def attach(model: Any, plan: Any) -> Any:
            adapted = original(model, plan)
            if plan.lora is not None:
                change(adapted)
            return adapted

        return attach

    around(patch, "impl.prepare:attach", make)


@mutant(
    "b079", case="P01/mixtral/lora/single", issue="https://github.com/unslothai/unsloth/pull/6936"
)
def lora_is_announced_and_not_attached(patch: pytest.MonkeyPatch) -> None:
    """The plan speaks of LoRA and the model has no adapter."""
    around(patch, "impl.prepare:attach", lambda original: lambda model, plan: model)


@mutant(
    "b105", case="P02/qwen3_next/lora/single", issue="https://github.com/huggingface/peft/pull/3711"
)
def shared_experts_become_routed_ones(patch: pytest.MonkeyPatch) -> None:
    """PEFT turns the names of the shared expert into those of the routed experts."""
    drop_patch(patch, "literal_lora_targets")


@mutant(
    "b076", case="P03/mixtral/lora/single", issue="https://github.com/huggingface/peft/issues/3009"
)
def only_linear_modules_are_targets(patch: pytest.MonkeyPatch) -> None:
    """Expert weights are no linear layers: names of theirs match nothing, without a word."""

    def make(original: Any) -> Any:
        def names_regex(*args: Any) -> Any:
            regex, targets = original(*args)
            return regex, replace(targets, parameters=(), warnings=())

        return names_regex

    around(patch, "impl.plan_lora:names_regex", make)
    around(patch, "impl.adapters:_warn_of_missed_experts", lambda original: lambda *args: None)


@mutant("generic-start", case="P04/mixtral/lora/single", issue="axolotl 0.21.0 (b117)")
def both_factors_are_drawn(patch: pytest.MonkeyPatch) -> None:
    """A fresh adapter already changes the model: lora_B is drawn as lora_A is."""

    def draw(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.02)

    after_attaching(patch, draw)


@mutant(
    "b101", case="P05/gemma3-vlm/lora/single", issue="https://github.com/fanqiNO1/FAI-RL/issues/105"
)
def suffixes_reach_into_the_tower(patch: pytest.MonkeyPatch) -> None:
    """Names without a path adapt the vision tower too, which text does not feed."""

    def make(original: Any) -> Any:
        def attach(model: Any, plan: Any) -> Any:
            lora = replace(plan.lora, target_modules=r".*\.(q_proj|v_proj)")
            return original(model, replace(plan, lora=lora))

        return attach

    around(patch, "impl.prepare:attach", make)
    around(patch, "impl.adapters:_refuse_frozen", lambda original: lambda *args: None)


@mutant(
    "b109",
    case="P06/gemma4-text/lora/single",
    issue="https://github.com/huggingface/peft/issues/2777",
)
def merging_ties_the_head_again(patch: pytest.MonkeyPatch) -> None:
    """The trained copy of a tied head is lost in merging."""

    def make(original: Any) -> Any:
        def tie(merged: Any, name: str, weights: Any) -> None:
            merged.get_output_embeddings().weight = merged.get_input_embeddings().weight

        return tie

    around(patch, "impl.checkpoints:_keep_trained", make)


@mutant("generic-scaling", case="P07/mixtral/lora/single", issue="bugs.md §13 (alpha for alpha/r)")
def the_rank_is_left_out_of_the_scaling(patch: pytest.MonkeyPatch) -> None:
    """Merging multiplies by alpha instead of alpha / r."""

    def make(original: Any) -> Any:
        return lambda self, adapter: original(self, adapter) * self.r[adapter]

    around(patch, f"{LAYER}:Linear.get_delta_weight", make)


@mutant(
    "b102",
    case="P07/mixtral/lora-experts/single",
    issue="https://github.com/huggingface/peft/issues/3083",
)
def expert_factors_are_read_in_another_order(patch: pytest.MonkeyPatch) -> None:
    """lora_B of stacked experts is read expert by expert, not rank by rank."""

    def make(original: Any) -> Any:
        def delta(self: Any, adapter: str, *args: Any, **kwargs: Any) -> Any:
            b, rank = self.lora_B[adapter].weight, self.r[adapter]
            kept = b.data
            b.data = kept.view(b.shape[0], -1, rank).transpose(1, 2).reshape(b.shape)
            try:
                return original(self, adapter, *args, **kwargs)
            finally:
                b.data = kept

        return delta

    around(patch, f"{LAYER}:ParamWrapper.get_delta_weight", make)


@mutant(
    "generic-two-adapters",
    case="P08/mixtral/lora/single",
    issue="https://github.com/huggingface/peft/releases/tag/v0.21.2",
)
def the_second_adapter_joins_the_first(patch: pytest.MonkeyPatch) -> None:
    """Switching to another adapter leaves the one before active."""

    def make(original: Any) -> Any:
        def set_adapter(self: Any, names: Any, *args: Any, **kwargs: Any) -> None:
            wanted = [names] if isinstance(names, str) else list(names)
            original(self, list(dict.fromkeys([*self.active_adapters, *wanted])), *args, **kwargs)

        return set_adapter

    around(patch, "peft.tuners.tuners_utils:BaseTunerLayer.set_adapter", make)


@mutant("generic-frozen", case="P09/mixtral/lora/single", issue="bugs.md §13 (frozen trained)")
def a_norm_trains_beside_the_adapters(patch: pytest.MonkeyPatch) -> None:
    """A base weight is left trainable and moves with the adapters."""

    def thaw(model: Any) -> None:
        parameter = next(p for n, p in model.named_parameters() if "layernorm" in n)
        parameter.requires_grad_(True)

    after_attaching(patch, thaw)


@mutant(
    "b141",
    case="P10/mixtral/bf16+lora/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3090",
)
def one_factor_keeps_another_dtype(patch: pytest.MonkeyPatch) -> None:
    """lora_B stays in float32 where lora_A takes the model's dtype."""

    def cast(model: Any) -> None:
        for name, module in model.named_modules():
            if name.endswith("lora_A.default"):
                module.to(torch.bfloat16)

    after_attaching(patch, cast)


@mutant(
    "b119",
    case="P13/mixtral/lora+ckpt-nonreentrant/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/2928",
)
def a_checkpointed_layer_passes_no_gradient_on(patch: pytest.MonkeyPatch) -> None:
    """Inputs of checkpointed layers are detached: only the last layer's adapters learn."""
    detached_inputs(patch)


def detached_inputs(patch: pytest.MonkeyPatch) -> None:
    """Every tensor that goes into a checkpointed layer loses its history."""

    def make(original: Any) -> Any:
        def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
            cut = [a.detach() if torch.is_tensor(a) else a for a in args]
            return original(function, *cut, **kwargs)

        return checkpoint

    around(patch, "transformers.modeling_utils:checkpoint", make)


@mutant("b111", case="P14/mixtral/lora-experts/single", issue="live defect L13")
def the_proxy_of_an_adapter_stays(patch: pytest.MonkeyPatch) -> None:
    """Each forward adds the delta of a parametrized expert weight once more."""
    drop_patch(patch, "parametrization_leak")


@mutant(
    "generic-dropout-on-weights",
    case="P15/mixtral/lora-experts/single",
    issue="https://github.com/huggingface/peft/pull/2638",
)
def dropout_is_taken_and_not_applied(patch: pytest.MonkeyPatch) -> None:
    """Dropout on adapters of expert weights is accepted, and nothing applies it."""
    around(patch, "impl.plan_lora:_dropout", lambda original: lambda draft, names: 0.0)


@mutant(
    "b102",
    case="P11/mixtral/lora-experts/single",
    issue="https://github.com/huggingface/peft/issues/3083",
)
def the_pattern_misses_fused_weights(patch: pytest.MonkeyPatch) -> None:
    """A rank pattern is matched with modules only: the expert weight gets the common rank."""
    config_without(patch, "rank_pattern")


@mutant(
    "b102",
    case="P11/mixtral/lora-experts+kernels/single",
    issue="https://github.com/huggingface/peft/issues/3083",
)
def the_alpha_of_a_fused_weight_is_lost(patch: pytest.MonkeyPatch) -> None:
    """An alpha pattern is dropped: the adapter has its rank and the common alpha."""
    config_without(patch, "alpha_pattern")


def config_without(patch: pytest.MonkeyPatch, name: str) -> None:
    """PEFT's configurations without one of their patterns."""

    def make(original: Any) -> Any:
        def peft_config(*args: Any) -> Any:
            config = original(*args)
            setattr(config, name, {})
            return config

        return peft_config

    around(patch, "impl.adapters:peft_config", make)
