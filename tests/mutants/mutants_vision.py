"""Bugs of images and towers: V01 to V12."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.mutants import mutant
from tests.mutants.mutants_forward import around, drop_patch

MODEL = "transformers.models.gemma3.modeling_gemma3:Gemma3Model"


def forward_with(patch: pytest.MonkeyPatch, change: Any) -> None:
    """Gemma 3's forward, its keyword arguments through `change`."""

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, **change(kwargs))

        return forward

    around(patch, f"{MODEL}.forward", make)


@mutant(
    "b180", case="V01/gemma3-vlm/-/single", issue="https://github.com/huggingface/trl/issues/4142"
)
def text_without_type_ids_is_taken_for_an_image(patch: pytest.MonkeyPatch) -> None:
    """Text alone is attended to in both directions where no modality ids are given."""

    def change(kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        return {**kwargs, "token_type_ids": torch.ones_like(ids)}

    forward_with(patch, change)


@mutant(
    "b181",
    case="V02/gemma3-vlm/images/single",
    issue="https://github.com/huggingface/transformers/issues/34625",
)
def features_land_one_place_later(patch: pytest.MonkeyPatch) -> None:
    """Image features overwrite the token behind the image."""

    def make(original: Any) -> Any:
        def mask(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs).roll(1, dims=1)

        return mask

    around(patch, f"{MODEL}.get_placeholder_mask", make)


@mutant(
    "b181",
    case="V03/gemma3-vlm/images/single",
    issue="https://github.com/huggingface/transformers/issues/35779",
)
def a_placeholder_too_few_is_accepted(patch: pytest.MonkeyPatch) -> None:
    """Placeholders and features are not counted."""

    def make(original: Any) -> Any:
        def mask(self: Any, input_ids: Any, **kwargs: Any) -> Any:
            return (input_ids == self.config.image_token_id).unsqueeze(-1)

        return mask

    around(patch, f"{MODEL}.get_placeholder_mask", make)


@mutant(
    "b027",
    case="V04/gemma3-vlm/images/single",
    issue="https://github.com/huggingface/transformers/pull/45454",
)
def missing_type_ids_are_ignored(patch: pytest.MonkeyPatch) -> None:
    """An image without modality ids is attended to causally, without a word."""
    drop_patch(patch, "image_type_ids")


@mutant("L3", case="V05/gemma3-vlm/images/single", issue="live defect L3")
def type_ids_do_not_reach_the_masks(patch: pytest.MonkeyPatch) -> None:
    """Images are attended to causally although their ids are given."""
    forward_with(patch, lambda kwargs: {**kwargs, "token_type_ids": None})


@mutant("generic-tower-mode", case="V06/gemma3-vlm/images/single", issue="axolotl#3584 (towers)")
def frozen_towers_go_into_training_mode(patch: pytest.MonkeyPatch) -> None:
    """`train()` switches the dropout of a frozen tower on again."""
    around(patch, "impl.freeze:_stay_in_eval", lambda original: nn.Module.train)


@mutant(
    "b131",
    case="V06/gemma3-vlm/images/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3584",
)
def towers_are_not_frozen(patch: pytest.MonkeyPatch) -> None:
    """Towers that were to be frozen train."""
    around(patch, "impl.prepare:freeze", lambda original: lambda *args: lambda: None)


@mutant(
    "generic-image-order", case="V07/gemma3-vlm/images/single", issue="checks.md V07 (no thread)"
)
def images_are_dealt_in_another_order(patch: pytest.MonkeyPatch) -> None:
    """Each row gets the image of the row before it."""

    def change(kwargs: Any) -> Any:
        pixels = kwargs.get("pixel_values")
        return kwargs if pixels is None else {**kwargs, "pixel_values": pixels.roll(1, dims=0)}

    forward_with(patch, change)


@mutant("L26", case="V08/gemma3-vlm/images/single", issue="live defect L26")
def the_last_modality_ids_stay(patch: pytest.MonkeyPatch) -> None:
    """Text after images is masked by the modality ids of the batch before."""
    slot: list[torch.Tensor] = []

    def change(kwargs: Any) -> Any:
        ids, given = kwargs["input_ids"], kwargs.get("token_type_ids")
        if kwargs.get("pixel_values") is not None:
            slot[:] = [given]
        elif slot:
            given = torch.zeros_like(ids)
            width = min(ids.shape[1], slot[0].shape[1])
            given[:, :width] = slot[0][0, :width]
        return {**kwargs, "token_type_ids": given}

    forward_with(patch, change)


@mutant(
    "b101", case="V12/gemma3-vlm/-/single", issue="https://docs.axolotl.ai/docs/multimodal.html"
)
def the_projector_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Only the tower is frozen, not what connects it."""
    around(
        patch,
        "impl.prepare:freeze",
        lambda original: lambda model, names: original(model, names[:1]),
    )
