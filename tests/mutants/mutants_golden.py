"""Bugs of what older versions wrote: C04, C12, C13."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mutants import mutant
from tests.mutants.mutants_forward import around


@mutant(
    "b102",
    case="C04/mixtral/lora-experts/single",
    issue="https://github.com/huggingface/peft/issues/3083",
)
def old_expert_factors_are_read_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    """An adapter written before the features were swapped loads, and means another update."""

    def make(original: Any) -> Any:
        return lambda a, b, experts: original(a, b, a.shape[0] // experts)

    around(patch, "impl.adapter_history:_exchanged", make)


@mutant(
    "b166",
    case="C04/gemma4-moe/lora/single",
    issue="https://github.com/huggingface/transformers/issues/38927",
)
def old_keys_are_not_found(patch: pytest.MonkeyPatch) -> None:
    """No key of an older nesting has a place; the adapter stays fresh, and nobody says so."""
    from peft import set_peft_model_state_dict

    def make(original: Any) -> Any:
        def put(adapted: Any, tensors: Any, where: Any) -> None:
            lost = {key.replace("language_model.", ""): value for key, value in tensors.items()}
            set_peft_model_state_dict(adapted, lost)

        return put

    around(patch, "impl.checkpoints:put_adapter", make)


@mutant(
    "b166-checkpoint",
    case="C13/gemma3-vlm/-/single",
    issue="https://github.com/huggingface/transformers/issues/38927",
)
def old_layout_of_keys_is_not_found(patch: pytest.MonkeyPatch) -> None:
    """The decoder layers of a checkpoint are under names that nobody looks for: fresh weights."""

    def make(original: Any) -> Any:
        def load(cls: Any, path: Any, kwargs: Any) -> Any:
            return cls.from_pretrained(path, key_mapping={r"layers\.0\.": "blocks.0."}, **kwargs)

        return load

    around(patch, "impl.build:load_loudly", make)


@mutant(
    "generic-optimizer-state",
    case="C12/gemma3-text/lora/single",
    issue="https://github.com/huggingface/transformers/issues/48805",
)
def kept_optimizer_state_is_ignored(patch: pytest.MonkeyPatch) -> None:
    """A resumed training starts with fresh moments and the schedule's first rate."""
    around(
        patch,
        "transformers:Trainer._load_optimizer_and_scheduler",
        lambda original: lambda self, checkpoint: None,
    )
