"""Bugs of dtypes: D01 to D06."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.mutants import mutant
from tests.mutants.mutants_forward import MIXTRAL, around


@mutant("b160", case="D01/mixtral/-/single", issue="https://github.com/huggingface/trl/issues/3910")
def the_file_decides_the_dtype(patch: pytest.MonkeyPatch) -> None:
    """The default dtype is "auto": a bfloat16 file gives a bfloat16 model."""

    def make(original: Any) -> Any:
        return lambda cls, path, kwargs: original(cls, path, {**kwargs, "dtype": "auto"})

    around(patch, "impl.build:load_loudly", make)


@mutant(
    "generic-cast",
    case="D02/mixtral/bf16/single",
    issue="https://github.com/huggingface/trl/issues/4770",
)
def saving_leaves_the_model_in_float32(patch: pytest.MonkeyPatch) -> None:
    """The model is cast for the file, in place."""
    around(
        patch,
        "impl.checkpoints:save",
        lambda original: lambda model, path: original(model.float(), path),
    )


@mutant(
    "b009",
    case="D04/gemma4-moe/images/single",
    issue="https://github.com/huggingface/transformers/issues/46277",
)
def the_pooler_scales_in_float16(patch: pytest.MonkeyPatch) -> None:
    """The vision tower's output times the root of its width is inf in float16."""

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            hidden, *rest = original(self, *args, **kwargs)
            return (hidden.half().float(), *rest)

        return forward

    around(patch, "transformers.models.gemma4.modeling_gemma4:Gemma4VisionPooler.forward", make)


@mutant(
    "b080",
    case="D05/mixtral/bf16/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3791",
)
def rotary_frequencies_are_cast(patch: pytest.MonkeyPatch) -> None:
    """Casting the model casts the rotary frequencies with it."""

    def make(original: Any) -> Any:
        def load(*args: Any) -> Any:
            model = original(*args)
            for module in model.modules():
                if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
                    module.inv_freq = module.inv_freq.bfloat16()
            return model

        return load

    around(patch, "impl.build:load_loudly", make)


@mutant(
    "generic-router-dtype",
    case="D06/mixtral/bf16/single",
    issue="bugs.md §13 (router in bf16)",
)
def the_router_is_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Routing weights come from a softmax in bfloat16."""

    def make(original: Any) -> Any:
        def forward(self: Any, hidden: Any) -> Any:
            flat = hidden.reshape(-1, hidden.shape[-1])
            logits = torch.nn.functional.linear(flat, self.weight)
            scores = torch.nn.functional.softmax(logits, dim=-1)
            weights, indices = scores.topk(self.top_k, dim=-1)
            return logits, weights / weights.sum(-1, keepdim=True), indices

        return forward

    around(patch, f"{MIXTRAL}:MixtralTopKRouter.forward", make)
