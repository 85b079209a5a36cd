"""Bugs of what is detected and planned, and of whether it takes effect: X06 to X13, N01."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mutants import mutant
from tests.mutants.mutants_adapters import detached_inputs
from tests.mutants.mutants_forward import around


@mutant(
    "b133",
    case="X06/gemma4-moe/*/fsdp2",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3584",
)
def every_unsplittable_class_is_wrapped(patch: pytest.MonkeyPatch) -> None:
    """`_no_split_modules` is taken as it is: it lists the audio layer, which is not there."""

    def make(original: Any) -> Any:
        return lambda draft: (*original(draft), "Gemma4AudioLayer")

    around(patch, "impl.plan_parallel:_units", make)


@mutant(
    "b154",
    case="X07/gemma4-moe/*offload-legacy/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3733",
)
def only_true_switches_offloading_on(patch: pytest.MonkeyPatch) -> None:
    """`is True`: "legacy" and "disk" are ignored."""

    def make(original: Any) -> Any:
        def offload(model: Any, plan: Any, state: Any) -> None:
            if plan.offload is True:
                original(model, plan, state)

        return offload

    around(patch, "impl.prepare:_offload", make)


@mutant("generic-no-checkpointing", case="X07/*/*ckpt-nonreentrant*/single", issue="bugs.md §13")
def checkpointing_is_asked_for_and_not_applied(patch: pytest.MonkeyPatch) -> None:
    """Every layer runs once."""
    around(patch, "impl.prepare:_checkpointing", lambda original: lambda *args: None)


@mutant(
    "L1",
    case="X08/gemma4-e2b/ckpt-reentrant/single",
    issue="https://github.com/unslothai/unsloth-zoo/pull/813",
)
def reentrant_is_planned_as_asked(patch: pytest.MonkeyPatch) -> None:
    """Reentrant checkpointing is planned for layers that share keys and values."""
    around(
        patch, "impl.plan_checkpointing:_why_not_reentrant", lambda original: lambda _: ("", None)
    )


@mutant(
    "b012",
    case="X09/gemma3-vlm/-/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3354",
)
def the_text_class_is_built(patch: pytest.MonkeyPatch) -> None:
    """A multimodal checkpoint is loaded by the class of its text part."""

    def make(original: Any) -> Any:
        def load(cls: Any, path: Any, kwargs: Any) -> Any:
            from transformers import Gemma3ForCausalLM

            return Gemma3ForCausalLM(kwargs["config"].get_text_config())

        return load

    around(patch, "impl.build:load_loudly", make)


@mutant(
    "generic-wrapper",
    case="X10/mixtral/lora/single",
    issue="https://docs.axolotl.ai/docs/agents/model_architectures.html",
)
def the_pattern_knows_no_wrapper(patch: pytest.MonkeyPatch) -> None:
    """Under checkpoint wrappers the pattern matches nothing."""

    def make(original: Any) -> Any:
        def regex(traits: Any) -> Any:
            pattern, excluded = original(traits)
            return pattern.replace("(_checkpoint_wrapped_module.)?", ""), excluded

        return regex

    around(patch, "impl.plan_lora:default_regex", make)


@mutant(
    "b131",
    case="X13/gemma3-vlm/-/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3584",
)
def unfed_towers_are_not_thought_of(patch: pytest.MonkeyPatch) -> None:
    """Towers train without images, and DDP waits for their gradients."""

    def make(original: Any) -> Any:
        def decide(self: Any, name: str, value: Any, *args: Any) -> Any:
            off = name in ("freeze_mm_modules", "ddp_find_unused_parameters")
            return original(self, name, False if off else value, *args)

        return decide

    around(patch, "impl.plan_draft:Draft.decide", make)


@mutant("b170", case="N01/gemma4-text/*kernels/single", issue="live defect L16")
def the_fused_loss_has_no_softcap(patch: pytest.MonkeyPatch) -> None:
    """With kernels on, the loss is that of uncapped logits."""
    around(
        patch,
        "impl.kernels.cross_entropy:Form",
        lambda original: lambda vocabulary, softcap, *rest: original(vocabulary, None, *rest),
    )


@mutant(
    "b119",
    case="N01/mixtral/*ckpt-nonreentrant*/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/2928",
)
def checkpointing_cuts_the_gradients(patch: pytest.MonkeyPatch) -> None:
    """With checkpointing on, the loss is right and the first layers do not learn."""
    detached_inputs(patch)
