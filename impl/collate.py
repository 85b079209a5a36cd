"""Samples to a batch: padded or packed, with everything the forward needs and labels that train."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import Refused
from .loss import IGNORED
from .model_facts import TYPE_ID_NAMES
from .training_plan import TrainingPlan

_PER_TOKEN = ("input_ids", "labels", *TYPE_ID_NAMES)
_DERIVED = ("attention_mask", "position_ids")
_IMAGES = ("pixel_values", "pixel_values_videos")


def collate(
    samples: Sequence[Mapping[str, Any]],
    plan: TrainingPlan,
    *,
    pad_id: int = 0,
    ignored_ids: Collection[int] = (),
    pad_to_multiple_of: int = 1,
) -> dict[str, Tensor]:
    """One batch of samples, packed into a row where the plan packs, padded on the right otherwise.

    samples: `input_ids` (length,), optionally `labels` and type ids (length,), and image, video or
        audio features with their leading dimension, which are laid end to end.
    ignored_ids: ids that are never labelled, such as `label_free_ids(config)`. Positions that the
        type ids mark as no text are never labelled either. Without `labels` every other is.
    pad_to_multiple_of: every per-token tensor is padded to a multiple, all alike
        (LlamaFactory#10736).
    Packed: `position_ids` restart with each sample, there is no `attention_mask` (it would join the
    documents, axolotl#2449), and no label of one document is predicted from another.
    Raises Refused, naming the sample, for lengths that differ or features without placeholders.
    """
    if not samples:
        raise ValueError("collate: no samples")
    named = _type_ids_name(samples, plan)
    rows = [_row(i, sample, named, ignored_ids) for i, sample in enumerate(samples)]
    batch = (
        _pack(rows, samples, pad_id, pad_to_multiple_of)
        if plan.pack
        else _pad(rows, pad_id, pad_to_multiple_of)
    )
    return batch | _features(samples)


def label_free_ids(config: Any) -> frozenset[int]:
    """Ids that carry no text to learn: padding, image, audio, video and their begin and end.

    Read from the top configuration's `…_token_id` and `…_token_index` fields; bos, eos and the
    decoder's own control tokens stay labelled, since a model must learn to stop.
    """
    kept = ("bos_", "eos_", "decoder_start_", "sep_")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: set[int] = set()
    for part in (config, text):
        for key, value in vars(part).items():
            names = key.endswith(("_token_id", "_token_index")) and not key.startswith(kept)
            if names and isinstance(value, int):
                found.add(value)
    if text.eos_token_id is not None:
        eos = text.eos_token_id
        found -= set(eos) if isinstance(eos, list | tuple) else {eos}
    return frozenset(found)


def _type_ids_name(samples: Sequence[Mapping[str, Any]], plan: TrainingPlan) -> str | None:
    """Under which name the batch carries modality ids, if anything in it needs them."""
    given = [name for name in TYPE_ID_NAMES if any(name in sample for sample in samples)]
    if given:
        return given[0]
    if any(name in sample for sample in samples for name in _IMAGES):
        needed = getattr(plan.traits, "type_ids", None)
        if needed:
            raise Refused(
                f"samples with images carry no {needed}; the model would attend to them causally"
            )
    return None


def _row(
    index: int, sample: Mapping[str, Any], type_ids: str | None, ignored_ids: Collection[int]
) -> dict[str, Tensor]:
    ids = torch.as_tensor(sample["input_ids"]).long().flatten()
    labels = torch.as_tensor(sample.get("labels", ids)).long().clone()
    row = {"input_ids": ids, "labels": labels}
    if type_ids is not None:
        row[type_ids] = torch.as_tensor(sample.get(type_ids, torch.zeros_like(ids))).long()
    for name, tensor in row.items():
        if tensor.shape != ids.shape:
            raise Refused(
                f"sample {index}: {name} has {tuple(tensor.shape)}, input_ids {tuple(ids.shape)}"
            )
    if any(name in sample for name in _IMAGES) and type_ids and not bool(row[type_ids].any()):
        raise Refused(f"sample {index} has image features but no image position in {type_ids}")
    if ignored_ids:
        labels[torch.isin(ids, torch.tensor(sorted(ignored_ids)))] = IGNORED
    if type_ids is not None:
        labels[row[type_ids] != 0] = IGNORED
    return row


def _fill(name: str, pad_id: int) -> int:
    return {"input_ids": pad_id, "labels": IGNORED}.get(name, 0)


def _pad(rows: list[dict[str, Tensor]], pad_id: int, multiple: int) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    longest = _rounded(int(lengths.max()), multiple)
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        whole = torch.full((len(rows), longest), _fill(name, pad_id))
        for line, row in zip(whole, rows, strict=True):
            line[: len(row[name])] = row[name]
        batch[name] = whole
    if bool((lengths < longest).any()):
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def _pack(
    rows: list[dict[str, Tensor]],
    samples: Sequence[Mapping[str, Any]],
    pad_id: int,
    multiple: int,
) -> dict[str, Tensor]:
    if any("image_grid_thw" in sample or "video_grid_thw" in sample for sample in samples):
        raise Refused(
            "images of this family have three-row positions, which restart inside a packed row"
            " only by the model's own index; set sample_packing off for images"
        )
    lengths = [len(row["input_ids"]) for row in rows]
    total = sum(lengths)
    extra = _rounded(total, multiple) - total
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if name == "labels":
            for part in parts:
                part[:1] = IGNORED  # only the document before could predict it
        parts.append(torch.full((extra,), _fill(name, pad_id)))
        batch[name] = torch.cat(parts)[None]
    # the padding is a document of its own
    positions = [torch.arange(n) for n in (*lengths, extra)]
    batch["position_ids"] = torch.cat(positions)[None]
    return batch


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _features(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    known = {*_PER_TOKEN, *_DERIVED}
    names = dict.fromkeys(name for sample in samples for name in sample if name not in known)
    features = {
        name: torch.cat([torch.as_tensor(s[name]) for s in samples if name in s]) for name in names
    }
    return features
