"""Bugs of reading what older versions wrote: C04, C12, C13."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.mutants import mutant
from tests.mutants.mutants_checkpoints import order_changed
from tests.mutants.mutants_forward import around


@mutant(
    "b103", case="C04/mixtral/lora/single", issue="https://github.com/huggingface/peft/issues/3197"
)
def old_keys_are_passed_over(patch: pytest.MonkeyPatch) -> None:
    """An adapter of an older version is there after loading, and is a fresh one."""
    around(patch, "impl.checkpoints:put_adapter", lambda original: lambda *args: None)


@mutant(
    "b102",
    case="C04/mixtral/lora-experts/single",
    issue="https://github.com/huggingface/peft/issues/3083",
)
def old_expert_factors_are_taken_as_they_lie(patch: pytest.MonkeyPatch) -> None:
    """lora_B of expert weights is read in the order of another layout."""
    order_changed(patch)


@mutant(
    "b196",
    case="C12/gemma3-text/lora/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3646",
)
def kept_moments_are_not_read(patch: pytest.MonkeyPatch) -> None:
    """A training that goes on has a fresh optimizer and schedule."""
    trainer = import_module("impl.fit").Trainer
    patch.setattr(trainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)


@mutant(
    "b166",
    case="C13/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/38927",
)
def keys_of_older_layouts_are_not_renamed(patch: pytest.MonkeyPatch) -> None:
    """Weights under older names are not found and start at random, with a line in the log."""
    around(
        patch,
        "transformers.modeling_utils:get_model_conversion_mapping",
        lambda original: lambda *args, **kwargs: [],
    )
    around(
        patch,
        "impl.build:load_loudly",
        lambda original: lambda cls, path, kwargs: cls.from_pretrained(path, **kwargs),
    )


@mutant(
    "b102-conversion",
    case="C04/mixtral/lora-experts/single",
    issue="https://github.com/huggingface/peft/issues/3083",
)
def factors_from_before_the_swap_are_exchanged_wrongly(patch: pytest.MonkeyPatch) -> None:
    """An adapter written before the features were swapped loads, and means another update."""
    around(
        patch,
        "impl.adapter_history:_exchanged",
        lambda original: lambda a, b, experts: original(a, b, a.shape[0] // experts),
    )
