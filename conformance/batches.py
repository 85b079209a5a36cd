"""Deterministic samples and the suite's own, deliberately dumb collation.

A sample is a dict of tensors without a batch dimension: `input_ids` and `labels` (length,), type
ids (length,) where it has images, and the features of its images or audio with their leading
dimension (images, or patches for the families that concatenate patches). Sequences are longer than
twice the window of any tiny model; samples of one batch have unequal numbers of labels.

Padding reaches beyond the window, as in life, so a padded query of a sliding layer sees nothing.
Eager
attention of transformers casts the mask of such a row to float32 and gives NaN under float64: ask
`build_stock` for `attn="sdpa"` there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from conformance.case import ImageInputs, Model

Sample = dict[str, torch.Tensor]

IGNORE = -100
SHORT, LONG = 13, 24
FIRST_TEXT_ID = 3  # 0, 1 and 2 are padding, end and begin

# kind -> lengths and images of the samples, repeated as often as needed
_LENGTHS: dict[str, tuple[int, ...]] = {
    "text": (SHORT,),
    "padded": (SHORT, LONG, 16, 11),
    "packed": (10, 14, 7, 12),
    "images": (LONG,),
    "mixed": (SHORT, LONG, 16, LONG),
    "audio": (SHORT, 14, 16, SHORT),
}
_IMAGES: dict[str, tuple[int, ...]] = {"images": (1, 2, 0), "mixed": (1, 0, 0, 2)}
_TYPE_IDS = ("mm_token_type_ids", "token_type_ids")
_PER_TOKEN = ("input_ids", "labels", *_TYPE_IDS)
KINDS = tuple(_LENGTHS)


@dataclass(frozen=True)
class AudioInputs:
    """What one piece of audio of a tiny model is, read off its configuration."""

    token_id: int
    tokens: int
    features: tuple[int, int]  # frames, features a frame
    begin_id: int
    end_id: int


def audio_inputs(model: Model) -> AudioInputs | None:
    """How `model` takes audio, or None. Two strided convolutions make one token of four frames."""
    config = model.tiny.get("audio_config")
    if config is None:
        return None
    tokens = 3
    if "audio_embed_dim" in config:
        features = (tokens, int(config["audio_embed_dim"]))
    else:
        features = (4 * tokens, int(config["subsampling_conv_channels"][0]))
    ids = model.tiny
    return AudioInputs(
        ids["audio_token_id"], tokens, features, ids["boa_token_id"], ids["eoa_token_index"]
    )


def samples(model: Model, kind: str, seed: int = 0, count: int = 2) -> list[Sample]:
    """`count` samples of one of `KINDS`; equal for equal arguments, and for models of equal inputs.

    text: one length. padded: lengths vary. packed: short documents, for `pack`. images: one length,
    0 to 2 images a sample. mixed: lengths and images vary, some samples are text. audio: one clip
    each.
    Raises ValueError for an unknown kind or one that the model has no inputs for.
    """
    if kind not in _LENGTHS:
        raise ValueError(f"unknown kind of batch {kind!r}; there are {', '.join(KINDS)}")
    if kind in _IMAGES and model.images is None:
        raise ValueError(f"model {model.name} takes no images, asked for kind {kind!r}")
    if kind == "audio" and audio_inputs(model) is None:
        raise ValueError(f"model {model.name} takes no audio, asked for kind {kind!r}")
    lengths, images = _LENGTHS[kind], _IMAGES.get(kind, (0,))
    return [
        _sample(model, kind, seed, i, lengths[i % len(lengths)], images[i % len(images)])
        for i in range(count)
    ]


def _sample(model: Model, kind: str, seed: int, index: int, length: int, images: int) -> Sample:
    digest = hashlib.sha256(f"{kind}/{seed}/{index}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    ids = torch.randint(FIRST_TEXT_ID, model.text_vocab, (length,), generator=rng)
    is_media = torch.zeros(length, dtype=torch.bool)
    is_image = torch.zeros(length, dtype=torch.bool)
    blocks: list[tuple[int, int, int, int]] = []
    if model.images is not None and images:
        spec = model.images
        begin, end = spec.begin_id, spec.end_id
        assert begin is not None and end is not None
        blocks = [(begin, spec.token_id, spec.tokens_per_image, end)] * images
    audio = audio_inputs(model) if kind == "audio" else None
    if audio is not None:
        blocks = [(audio.begin_id, audio.token_id, audio.tokens, audio.end_id)]
    at = 2 + index % 2  # placeholders from the fourth or fifth token on: across the window's edge
    for begin, token, tokens, end in blocks:
        stop = at + tokens + 2
        assert stop < length, f"model {model.name}: no room for a block in {length} tokens"
        ids[at:stop] = torch.tensor([begin] + [token] * tokens + [end])
        is_media[at:stop] = True
        is_image[at + 1 : stop - 1] = audio is None
        at = stop + 2
    labels = ids.masked_fill(is_media, IGNORE)
    labels[: (1 + 2 * index) % (length // 2 + 2)] = IGNORE  # a prompt of its own length
    sample: Sample = {"input_ids": ids, "labels": labels}
    if model.images is not None and images:
        sample |= _image_features(model.images, images, rng)
        if model.images.type_ids:
            sample[model.images.type_ids] = is_image.long()
    if audio is not None:
        sample["input_features"] = _noise((1, *audio.features), rng)
        sample["input_features_mask"] = torch.ones(1, audio.features[0], dtype=torch.bool)
    return sample


def _image_features(spec: ImageInputs, images: int, rng: torch.Generator) -> Sample:
    pixels = torch.stack([_noise(spec.pixel_values, rng) for _ in range(images)])
    # a grid of patches for the families that concatenate the patches of all images
    concatenated = "image_grid_thw" in spec.extra
    found: Sample = {"pixel_values": pixels.flatten(0, 1) if concatenated else pixels}
    for argument in spec.extra:
        one = _MAKERS[argument](spec)
        found[argument] = torch.stack([one] * images)
    return found


def _noise(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 rounded to float32, as weights are."""
    return torch.rand(shape, generator=rng, dtype=torch.float64).float()


def _grid(spec: ImageInputs) -> tuple[int, int]:
    """Height and width of one image in patches, wider than high where the tokens allow it."""
    tokens = spec.tokens_per_image
    width = next(
        w for w in range(math.isqrt(tokens), tokens + 1) if w * w >= tokens > tokens % w == 0
    )
    pooled = math.isqrt(spec.pixel_values[0] // tokens)
    return tokens // width * pooled, width * pooled


def _image_position_ids(spec: ImageInputs) -> torch.Tensor:
    """(patches, 2): column and row of each patch, row by row; -1 for the padding at the end."""
    height, width = _grid(spec)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.full((spec.pixel_values[0], 2), -1)
    positions[: height * width] = torch.stack([columns.flatten(), rows.flatten()], dim=1)
    return positions


def _image_grid_thw(spec: ImageInputs) -> torch.Tensor:
    """(3,): one frame, rows and columns of patches."""
    return torch.tensor([1, *_grid(spec)])


_MAKERS = {"image_position_ids": _image_position_ids, "image_grid_thw": _image_grid_thw}


def stack(batch: Sequence[Sample], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """The samples as one batch, padded on the right.

    `attention_mask` only where something is padded, type ids only where there are images, no
    `position_ids`: what a model does without them is its own affair.
    """
    lengths = [len(sample["input_ids"]) for sample in batch]
    longest = max(lengths)
    stacked: dict[str, torch.Tensor] = {}
    for name in _PER_TOKEN:
        if any(name in sample for sample in batch):
            fill = {"input_ids": pad_id, "labels": IGNORE}.get(name, 0)
            rows = torch.full((len(batch), longest), fill)
            for row, sample, length in zip(rows, batch, lengths, strict=True):
                if name in sample:
                    row[:length] = sample[name]
            stacked[name] = rows
    if min(lengths) < longest:
        stacked["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return stacked | _features(batch)


def pack(batch: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """The samples as the documents of one row: restarting `position_ids` and no mask.

    The first label of each document is ignored, as no token of that document predicts it.
    """
    lengths = [len(sample["input_ids"]) for sample in batch]
    packed = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    for name in _PER_TOKEN:
        if any(name in sample for sample in batch):
            rows = [sample.get(name, torch.zeros_like(sample["input_ids"])) for sample in batch]
            packed[name] = torch.cat(rows)[None]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    packed["labels"][0, starts] = IGNORE
    return packed | _features(batch)


def _features(batch: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Image and audio tensors of all samples, one after the other along their first dimension."""
    names = dict.fromkeys(name for sample in batch for name in sample if name not in _PER_TOKEN)
    return {name: torch.cat([s[name] for s in batch if name in s]) for name in names}
