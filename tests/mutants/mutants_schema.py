"""Changes of what a version is, against the committed snapshot: X01 to X05, and X20."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conformance import schema_snapshot
from tests.mutants import mutant
from tests.mutants.mutants_forward import MIXTRAL, around


def built_anew(patch: pytest.MonkeyPatch) -> None:
    """The snapshot builds its model each time instead of keeping it."""
    patch.setattr(schema_snapshot, "_built", schema_snapshot._built.__wrapped__)


@mutant(
    "b190",
    case="X01/mixtral/-/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/2224",
)
def a_default_changes(patch: pytest.MonkeyPatch) -> None:
    """A configuration that says nothing means something else than before."""

    def make(original: Any) -> Any:
        return lambda self: {**original(self), "router_aux_loss_coef": 0.002}

    around(
        patch,
        "transformers.models.mixtral.configuration_mixtral:MixtralConfig.to_dict",
        make,
    )


@mutant(
    "b182",
    case="X02/mixtral/-/single",
    issue="https://github.com/modelscope/ms-swift/issues/8237",
)
def the_forward_has_another_signature(patch: pytest.MonkeyPatch) -> None:
    """A parameter of the forward is gone from its signature."""

    def make(original: Any) -> Any:
        def forward(self: Any, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            return original(self, input_ids=input_ids, labels=labels, **kwargs)

        return forward

    around(patch, f"{MIXTRAL}:MixtralForCausalLM.forward", make)


@mutant(
    "b133",
    case="X03/mixtral/-/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3584",
)
def an_absent_class_is_unsplittable(patch: pytest.MonkeyPatch) -> None:
    """`_no_split_modules` lists a class that the model does not have."""
    built_anew(patch)

    def make(original: Any) -> Any:
        def build(model: Any) -> Any:
            found = original(model)
            found._no_split_modules = [*found._no_split_modules, "MixtralAudioLayer"]
            return found

        return build

    around(patch, "conformance.schema_snapshot:_built", make)


@mutant(
    "b163", case="X04/mixtral/-/single", issue="https://github.com/modelscope/ms-swift/issues/9877"
)
def a_parameter_has_another_name(patch: pytest.MonkeyPatch) -> None:
    """The decoder is nested once more in memory."""
    built_anew(patch)

    def make(original: Any) -> Any:
        def build(model: Any) -> Any:
            found = original(model)
            found.model = nn.ModuleDict({"model": found.model})
            return found

        return build

    around(patch, "conformance.schema_snapshot:_built", make)


@mutant(
    "b165",
    case="X05/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/48075",
)
def the_conversion_of_a_class_is_missing(patch: pytest.MonkeyPatch) -> None:
    """Saved keys are those in memory, not the published ones."""
    around(
        patch,
        "transformers.modeling_utils:revert_weight_conversion",
        lambda original: lambda model, tensors: tensors,
    )


@mutant("generic-not-finite", case="X20/mixtral/fp64/single", issue="spec of X20 (trl#3910)")
def the_loss_is_not_finite(patch: pytest.MonkeyPatch) -> None:
    """A number that cannot be compared is recorded."""
    around(
        patch,
        "impl.loss:denominator",
        lambda original: lambda *args: torch.zeros_like(original(*args)),
    )
