"""Bugs of what is written to disk and read back: C01 to C10."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from tests.mutants import mutant
from tests.mutants.mutants_forward import around


@mutant(
    "b160",
    case="C01/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/42805",
)
def weights_are_read_in_half_precision(patch: pytest.MonkeyPatch) -> None:
    """What comes back from disk went through bfloat16."""

    def make(original: Any) -> Any:
        def load_weights(model: Any, folder: Any) -> None:
            original(model, folder)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.bfloat16())

        return load_weights

    around(patch, "impl.checkpoints:load_weights", make)


@mutant(
    "b164",
    case="C02/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/46265",
)
def loading_forgets_how_keys_were_converted(patch: pytest.MonkeyPatch) -> None:
    """A model that was loaded is saved under its names in memory, not under the published ones."""

    def make(original: Any) -> Any:
        def load_weights(model: Any, folder: Any) -> None:
            original(model, folder)
            model._weight_conversions = []

        return load_weights

    around(patch, "impl.checkpoints:load_weights", make)


@mutant(
    "b163", case="C03/mixtral/-/single", issue="https://github.com/modelscope/ms-swift/issues/9877"
)
def a_fresh_model_has_no_conversions(patch: pytest.MonkeyPatch) -> None:
    """Only a model that was loaded is saved through the conversions of its class."""

    def make(original: Any) -> Any:
        def revert(model: Any, tensors: Any) -> Any:
            loaded = getattr(model, "_weight_conversions", None) is not None
            return original(model, tensors) if loaded else tensors

        return revert

    around(patch, "transformers.modeling_utils:revert_weight_conversion", make)


@mutant(
    "b167",
    case="C05/gemma4-text/lora/single",
    issue="https://github.com/hiyouga/LLaMA-Factory/issues/10294",
)
def keys_of_another_class_are_passed_over(patch: pytest.MonkeyPatch) -> None:
    """An adapter whose keys need another prefix loads without a word and does nothing."""
    moved: list[bool] = []

    def finding(original: Any) -> Any:
        def move(base: Any, tensors: Any, folder: Any) -> Any:
            found = original(base, tensors, folder)
            moved[:] = [any(found(key) != key for key in tensors)]
            return found

        return move

    def putting(original: Any) -> Any:
        def put(adapted: Any, tensors: Any, where: Any) -> None:
            if not moved[0]:
                original(adapted, tensors, where)

        return put

    around(patch, "impl.checkpoints:_move", finding)
    around(patch, "impl.checkpoints:put_adapter", putting)


@mutant(
    "b108",
    case="C06/mixtral/lora/single",
    issue="https://github.com/vllm-project/vllm/issues/41384",
)
def unknown_keys_are_dropped(patch: pytest.MonkeyPatch) -> None:
    """The adapter is there after loading, and is a fresh one."""
    around(patch, "impl.checkpoints:put_adapter", lambda original: lambda *args: None)


@mutant(
    "b108",
    case="C06/mixtral/lora-experts/single",
    issue="https://github.com/vllm-project/vllm/issues/52198",
)
def expert_factors_are_turned_on_loading(patch: pytest.MonkeyPatch) -> None:
    """lora_B of expert weights is read in the order of another layout."""
    order_changed(patch)


def order_changed(patch: pytest.MonkeyPatch) -> None:
    """Columns of lora_B of expert weights arrive in the opposite order."""

    def make(original: Any) -> Any:
        def from_disk(adapted: Any, tensors: Any) -> Any:
            return {
                name: value.flip(1).contiguous()
                if ".experts." in name and "lora_B" in name
                else value
                for name, value in original(adapted, tensors).items()
            }

        return from_disk

    around(patch, "impl.checkpoints:from_disk", make)


@mutant(
    "b196",
    case="C07/mixtral/-/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3646",
)
def the_optimizer_starts_anew(patch: pytest.MonkeyPatch) -> None:
    """A resumed run has fresh moments and a fresh schedule."""
    trainer = import_module("impl.fit").Trainer
    patch.setattr(trainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)


@mutant(
    "b162",
    case="C07/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/48805",
)
def a_checkpoint_is_not_read_as_it_was_written(patch: pytest.MonkeyPatch) -> None:
    """Fused experts find no key in the checkpoint and keep the weights they had."""

    def make(original: Any) -> Any:
        def load_weights(model: Any, folder: Any) -> None:
            experts = {n: p.clone() for n, p in model.named_parameters() if ".experts." in n}
            original(model, folder)
            with torch.no_grad():
                for name, value in experts.items():
                    model.get_parameter(name).copy_(value)

        return load_weights

    around(patch, "impl.fit:load_weights", make)


@mutant(
    "b116",
    case="C10/mixtral/lora/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3771",
)
def the_export_holds_the_base(patch: pytest.MonkeyPatch) -> None:
    """Small deltas are lost in the export: it is written in the base's lower precision."""

    def make(original: Any) -> Any:
        def save(model: Any, path: Any) -> None:
            kept = {name: p.detach().clone() for name, p in model.named_parameters()}
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.bfloat16())
            original(model, path)
            with torch.no_grad():
                for name, value in kept.items():
                    model.get_parameter(name).copy_(value)

        return save

    around(patch, "impl.checkpoints:save", make)
