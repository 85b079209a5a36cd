"""Bugs of whole trainings: B03, B04, V13 to V15, W01 to W03, Q01 to Q04, P12."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from tests.mutants import mutant
from tests.mutants.mutants_forward import around


@mutant("b190", case="B03/mixtral/-/single", issue="axolotl#2224")
def another_template_is_trained_on(patch: pytest.MonkeyPatch) -> None:
    """What was fine is broken: the labels are those of another rendering."""

    def make(original: Any) -> Any:
        def shifted(labels: Any, shift_labels: Any) -> Any:
            return original(labels, shift_labels).roll(1, -1)

        return shifted

    around(patch, "impl.loss:shifted", make)


@mutant("generic-detached", case="B04/mixtral/-/single", issue="bugs.md §13")
def half_the_tokens_are_learnt_as_noise(patch: pytest.MonkeyPatch) -> None:
    """Half of the loss does not depend on the weights, so that it never falls."""

    def make(original: Any) -> Any:
        def summed(logits: Any, targets: Any, smoothing: float) -> Any:
            total, count = original(logits, targets, smoothing)
            return total / 2 + total.detach() * 0 + count * 2.0, count

        return summed

    around(patch, "impl.loss:summed", make)


@mutant(
    "b181-linear",
    case="V13/gemma3-vlm/lora+images/single",
    issue="https://docs.axolotl.ai/docs/multimodal.html",
)
def towers_are_adapted(patch: pytest.MonkeyPatch) -> None:
    """Bare names of projections reach the towers, which are not frozen either."""

    def make(original: Any) -> Any:
        def prepared(model: Any, plan: Any) -> Any:
            from dataclasses import replace

            lora = replace(plan.lora, target_modules=r".*\.(q|v)_proj")
            return original(model, replace(plan, lora=lora, freeze=()))

        return prepared

    around(patch, "impl.prepare:prepare", make)


@mutant(
    "b181-experts-left-out",
    case="V14/gemma4-moe/lora-experts+images+kernels/single",
    issue="https://github.com/huggingface/peft/issues/3083",
)
def experts_are_left_out(patch: pytest.MonkeyPatch) -> None:
    """Only modules are adapted; the experts, being parameters, are not."""

    def make(original: Any) -> Any:
        def prepared(model: Any, plan: Any) -> Any:
            from dataclasses import replace

            return original(model, replace(plan, lora=replace(plan.lora, target_parameters=())))

        return prepared

    around(patch, "impl.prepare:prepare", make)


def _dark(rows: Any) -> list[dict[str, Any]]:
    return [
        {k: torch.zeros_like(v) if k == "pixel_values" else v for k, v in row.items()}
        for row in rows
    ]


@mutant(
    "remove-unused-columns",
    case="V15/qwen3_5/lora+images/single",
    issue="https://docs.axolotl.ai/docs/multimodal.html",
)
def fit_drops_the_pixels(patch: pytest.MonkeyPatch) -> None:
    """The trainer's loop sees no picture."""

    def make(original: Any) -> Any:
        def collate(samples: Any, *args: Any, **options: Any) -> Any:
            return original(_dark(samples), *args, **options)

        return collate

    around(patch, "impl.fit:collate", make)


@mutant("w01-lower-median", case="W01/-/-/-", issue="families.md §1.1")
def the_lower_median_is_taken(patch: pytest.MonkeyPatch) -> None:
    """Of an even number of layers the wrong half is rescaled."""

    def make(original: Any) -> Any:
        def judge(members: Any, pattern: str, threshold: float, dry_run: bool) -> Any:
            low = sorted(members, key=lambda m: m[2])[: len(members) - (len(members) % 2 == 0)]
            return original(low, pattern, threshold, dry_run)

        return judge

    around(patch, "impl.weight_scales:_judge", make)


@mutant("w02-adapters", case="W02/-/-/-", issue="families.md §1.1")
def adapters_are_rescaled(patch: pytest.MonkeyPatch) -> None:
    """LoRA factors that the pattern catches are rescaled too."""

    def make(original: Any) -> Any:
        def measure(name: str, parameter: Any) -> Any:
            return original(name.replace("lora_", "low_"), parameter)

        return measure

    around(patch, "impl.weight_scales:_measure", make)


@mutant("w03-nothing", case="W03/qwen3_5_moe-text/-/single", issue="families.md §1")
def the_key_does_nothing(patch: pytest.MonkeyPatch) -> None:
    """The rule is read and nothing is repaired, as in every release so far."""

    def make(original: Any) -> Any:
        def normalize(model: Any, rules: Any) -> Any:
            return original(model, [])

        return normalize

    around(patch, "impl.weight_scales:normalize_weight_scales", make)


@mutant(
    "b-1849",
    case="Q01/mixtral/qlora/single",
    issue="https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849",
)
def experts_stay_whole(patch: pytest.MonkeyPatch) -> None:
    """Only linear layers are packed; a mixture of experts stays almost whole."""
    patch.setattr(import_module("impl.quantize"), "expert_modules", lambda inner: [])


def _other_level(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any) -> Any:
        def forward(self: Any, packed: Any) -> Any:
            return original(self, packed) * 1.01

        return forward

    around(patch, "impl.quantize:FourBit.forward", make)


@mutant("p12-scale", case="P12/mixtral/qlora/single", issue="axolotl#3799")
def scales_are_off(patch: pytest.MonkeyPatch) -> None:
    """Packed weights are expanded with scales that are 1 % too large."""
    _other_level(patch)


@mutant("q02-scale", case="Q02/mixtral/qlora/single", issue="axolotl#3771")
def gradients_pass_other_weights(patch: pytest.MonkeyPatch) -> None:
    """The gradient goes back through weights that are 1 % too large."""
    _other_level(patch)


@mutant("q03-half", case="Q03/mixtral/qlora/single", issue="axolotl#3771")
def half_of_the_adapter_is_saved(patch: pytest.MonkeyPatch) -> None:
    """Adapters come back as zeros."""

    def make(original: Any) -> Any:
        def load(model: Any, path: Any) -> Any:
            loaded = original(model, path)
            with torch.no_grad():
                for name, parameter in loaded.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(0.5)
            return loaded

        return load

    around(patch, "impl.checkpoints:load", make)


@mutant("q04-plain", case="Q04/mixtral/qlora/single", issue="axolotl#3771")
def merging_forgets_the_adapters(patch: pytest.MonkeyPatch) -> None:
    """Merged is the base, expanded, without what was learnt."""

    def make(original: Any) -> Any:
        def merge(model: Any) -> Any:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.zero_()
            return original(model)

        return merge

    around(patch, "impl.checkpoints:merge", make)


def _decided(patch: pytest.MonkeyPatch, key: str, wrong: Any) -> None:
    def make(original: Any) -> Any:
        def planned(*args: Any, **options: Any) -> Any:
            from dataclasses import replace

            plan = original(*args, **options)
            decision = replace(plan.decisions[key], value=wrong)
            return replace(plan, decisions={**plan.decisions, key: decision})

        return planned

    around(patch, "impl.plan:plan", make)


@mutant("quick-columns", case="V17/gemma4-dense/images/single", issue="model_architectures.md")
def unused_columns_are_removed(patch: pytest.MonkeyPatch) -> None:
    """Trainer drops what the forward does not name, the pictures among it."""
    _decided(patch, "remove_unused_columns", True)


@mutant("quick-packing", case="V18/gemma4-dense/images/single", issue="model_architectures.md")
def images_are_packed(patch: pytest.MonkeyPatch) -> None:
    """Samples with pictures are put into one row."""
    _decided(patch, "sample_packing", True)


@mutant("quick-prepare", case="V19/gemma4-dense/images/single", issue="model_architectures.md")
def the_data_set_is_prepared_without_the_processor(patch: pytest.MonkeyPatch) -> None:
    """Placeholders are tokenized and never expanded."""
    _decided(patch, "skip_prepare_dataset", False)


@mutant("quick-processor", case="V20/gemma4-dense/images/single", issue="model_architectures.md")
def the_tokenizer_stands_for_the_processor(patch: pytest.MonkeyPatch) -> None:
    """Batches have no pixels."""
    _decided(patch, "processor_type", None)


@mutant("quick-linear", case="P16/gemma4-moe/lora/single", issue="model_architectures.md")
def every_linear_layer_is_adapted(patch: pytest.MonkeyPatch) -> None:
    """Adapters go into towers that never get a gradient."""
    _decided(patch, "lora_target_linear", True)
