"""Samples to batches: shapes, masks, positions and what is labelled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance import batches, checkpoint
from impl.collate import collate, label_free_ids
from impl.errors import Refused
from tests.impl.plans import make_plan, spec


def text(*lengths: int) -> list[dict[str, Any]]:
    return [{"input_ids": torch.arange(3, 3 + n)} for n in lengths]


def test_padding() -> None:
    batch = collate(text(3, 5), make_plan(), pad_id=1)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1, 1], [3, 4, 5, 6, 7]]
    assert batch["labels"].tolist() == [[3, 4, 5, -100, -100], [3, 4, 5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert "attention_mask" not in collate(text(4, 4), make_plan())
    assert "position_ids" not in batch


def test_packing_restarts_positions_and_takes_no_mask() -> None:
    batch = collate(text(3, 2), make_plan(pack=True), pad_to_multiple_of=4)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 3, 4, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 4, 5, -100, 4, -100, -100, -100]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("pack", [False, True])
def test_every_token_wise_tensor_has_the_padded_length(pack: bool) -> None:
    samples = batches.samples(spec("gemma4-moe"), "mixed", count=3)
    batch = collate(samples, make_plan(pack=pack), pad_to_multiple_of=8)
    lengths = {
        key: batch[key].shape[1]
        for key in batch
        if key in ("input_ids", "labels")
        or (key.endswith(("type_ids", "position_ids")) and key != "image_position_ids")
    }
    assert len(set(lengths.values())) == 1 and next(iter(lengths.values())) % 8 == 0, lengths


def test_media_is_never_labelled() -> None:
    model_spec = spec("gemma4-moe")
    config = checkpoint.build_config(model_spec)
    samples = batches.samples(model_spec, "images")
    for sample in samples:
        sample["labels"] = sample["input_ids"].clone()
    batch = collate(samples, make_plan(model_spec), ignored_ids=label_free_ids(config))
    assert model_spec.images is not None
    images = model_spec.images
    for token in (images.token_id, images.begin_id, images.end_id, 0):
        where = batch["input_ids"] == token
        assert (batch["labels"][where] == -100).all(), token
    assert bool((batch["input_ids"] == images.begin_id).any())
    assert config.get_text_config().eos_token_id not in label_free_ids(config)
    assert len(batch["pixel_values"]) == sum(len(s.get("pixel_values", ())) for s in samples)


def test_bad_samples_are_named() -> None:
    with pytest.raises(Refused, match="sample 1: labels"):
        collate([*text(3), {"input_ids": [3, 4], "labels": [3]}], make_plan())
    bare = batches.samples(spec("gemma4-moe"), "images", count=1)
    bare[0].pop("mm_token_type_ids")
    with pytest.raises(Refused, match="mm_token_type_ids"):
        collate(bare, make_plan(spec("gemma4-moe")))
    empty = batches.samples(spec("gemma4-moe"), "images", count=1)
    empty[0]["mm_token_type_ids"] = torch.zeros_like(empty[0]["input_ids"])
    with pytest.raises(Refused, match="sample 0 has image features"):
        collate(empty, make_plan(spec("gemma4-moe")))
    with pytest.raises(Refused, match="three-row positions"):
        collate(batches.samples(spec("qwen3_5"), "images"), make_plan(pack=True))
