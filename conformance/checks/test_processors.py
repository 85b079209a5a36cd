"""Pictures, sounds and videos through the families' own processors, as far as the decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance import processors
from conformance.case import Case
from conformance.check import check
from conformance.checks.conversations import (
    IGNORE,
    chat,
    embeddings,
    pictured,
    plan_of,
    rows_of_pictures,
    runs,
)
from conformance.checks.probes import assert_reach, labelled, unwrapped
from conformance.numerics import assert_close, assert_close_step, assert_differs
from conformance.oracles.vision_positions import multimodal_positions
from conformance.subject import Subject
from conformance.tolerances import tolerance

Measured = dict[str, float]
PICTURES: dict[str, Any] = {
    "models": processors.WITH_PICTURES,
    "settings": ("images",),
    "marks": ("vision",),
}
SOUNDS: dict[str, Any] = {"models": processors.WITH_SOUND, "marks": ("vision",)}
# without torchvision there is no video here; the mutants of its kin are those of V21 and V28
VIDEOS: dict[str, Any] = {
    "models": processors.WITH_VIDEO,
    "marks": ("vision",),
    "correctness": False,
}
# height and width: square, wide, tall, odd, smaller than a token, and long as a ribbon
SIZES = ((48, 48), (40, 90), (84, 30), (23, 17), (3, 5), (12, 400), (300, 14), (61, 59))


def placeholder(subject: Subject, kind: str = "image") -> int:
    """The id that stands for a medium."""
    tokenizer = processors.tokenizer_of(processors.processor(processor_name(subject)))
    return int(getattr(tokenizer, f"{kind}_token_id"))


def processor_name(subject: Subject) -> str:
    """The kit's name, also of the model with room for pictures."""
    return subject.model_spec.name.removesuffix("-pictures")


def rows_of(features: Any) -> int:
    """How many vectors an encoder's pooled output holds."""
    found = features.pooler_output if hasattr(features, "pooler_output") else features
    parts = found if isinstance(found, list | tuple) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts)


@check("T03", **PICTURES)
def test_placeholders_are_as_many_as_features(
    case: Case, subject: Subject, measured: Measured, image_kit: str
) -> None:
    """Placeholders number what the tower gives, what is documented and what is foretold, by size.

    https://github.com/huggingface/transformers/issues/34625
    """
    processor, kit = processors.processor(image_kit), processors.KITS[image_kit]
    model: Any = pictured(subject).stock("float32").eval()
    token = placeholder(subject)
    assert kit.count is not None
    foretold = processor._get_num_multimodal_tokens(image_sizes=[list(s) for s in SIZES])
    for (height, width), told in zip(SIZES, foretold.num_image_tokens, strict=True):
        part = {"type": "image", "image": processors.blank(width, height)}
        batch = processor.apply_chat_template(
            [{"role": "user", "content": [part]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        pixels = {k: v for k, v in batch.items() if k.startswith(("pixel", "image"))}
        with torch.no_grad():
            given = rows_of(model.model.get_image_features(**subject.to(pixels, "float32")))
        counts = [int((batch["input_ids"] == token).sum()), given, int(told)]
        measured[f"{width} x {height}"] = counts[0]
        want = kit.count(height, width)
        assert counts == [want] * 3, (
            f"{case.id}: {width} x {height} is documented to be {want} tokens; placeholders,"
            f" features and the processor's forecast are {counts}"
        )


@check("V09", needs=("prepare", "chat"), **{**PICTURES, "models": ("qwen3_5", "qwen3_5_moe")})
def test_positions_of_pictures(case: Case, subject: Subject, measured: Measured) -> None:
    """The decoder's three rows of positions are the reference's: pictures of their own shape.

    https://github.com/modelscope/ms-swift/pull/8237
    """
    name = subject.model_spec.name
    batch = chat(subject, name, rows_of_pictures())
    model, caught = subject.model().eval(), []

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        caught.append(kwargs["position_ids"])

    decoder = unwrapped(model).model.language_model
    handle = decoder.register_forward_pre_hook(catch, with_kwargs=True)
    embeddings(model, batch)
    handle.remove()
    want, _ = multimodal_positions(
        batch["mm_token_type_ids"].tolist(),
        batch["image_grid_thw"].tolist(),
        merge=2,
        valid=batch["attention_mask"].tolist(),
    )
    real = batch["attention_mask"].bool().cpu()
    assert bool((want[1] != want[2])[real].any()), f"{case.id}: no picture has two sides"
    wrong = (caught[0][-3:].cpu() != want)[:, real].sum()
    measured["wrong positions"] = int(wrong)
    assert not wrong, f"{case.id}: {int(wrong)} of {3 * int(real.sum())} positions, tolerance 0"


@check("V11", needs=("prepare", "chat", "loss"), **PICTURES)
def test_a_dummy_picture_leaves_the_loss(
    case: Case, subject: Subject, measured: Measured, image_kit: str
) -> None:
    """An unlabelled row with a picture (a dummy for text) leaves loss and gradients of text alone.

    https://github.com/linkedin/Liger-Kernel/commit/e6f84b84
    """
    here = pictured(subject)
    text, dummy = rows_of_pictures((), ("odd",))
    plan = plan_of(here)
    alone = chat(here, image_kit, [text])
    both = chat(here, image_kit, [text, dummy])
    both["labels"][1] = IGNORE
    assert any("pixel" in key for key in both), f"{case.id}: there is no picture"
    assert not any("pixel" in key for key in alone), f"{case.id}: text alone has a picture"
    assert labelled(both) == labelled(alone) > 3, f"{case.id}: other labels"
    model = here.model(plan=plan)
    want, got = here.step(model, alone), here.step(model, both)
    got = replace(got, gradients={k: got.gradients[k] for k in want.gradients})
    limit = tolerance("gradients/accumulated", subject.numerics)
    assert_close_step(case.id, got, want, limit, measured)


@check("V21", needs=("prepare", "chat"), **PICTURES)
def test_each_picture_has_its_own_places(
    case: Case, subject: Subject, measured: Measured, image_kit: str
) -> None:
    """The k-th picture changes the embeddings of the k-th run of placeholders and no others.

    https://github.com/huggingface/transformers/issues/34625
    """
    here = pictured(subject)
    model = here.model().eval()
    batch = chat(here, image_kit, rows_of_pictures())
    before = embeddings(model, batch)
    token = placeholder(here)
    places = [(r, run) for r, ids in enumerate(batch["input_ids"]) for run in runs(ids == token)]
    assert len(places) == 5, f"{case.id}: {len(places)} runs of placeholders for 5 pictures"
    measured["placeholders"] = sum(len(run) for _, run in places)
    for number, (row, run) in enumerate(places):
        after = embeddings(model, chat(here, image_kit, repainted(number)))
        moved = {(r, c) for r, c in (after != before).any(-1).nonzero().tolist()}
        own = {(row, column) for column in run}
        assert moved == own, (
            f"{case.id}: picture {number} of row {row} moves {len(moved - own)} foreign places and"
            f" leaves {len(own - moved)} of its own {len(own)}"
        )


def repainted(number: int) -> list[processors.Conversation]:
    """The rows with noise for the picture of that number."""
    rows = rows_of_pictures()
    parts = [p for row in rows for m in row for p in m["content"] if p["type"] == "image"]
    parts[number]["image"] = processors.noise(*parts[number]["image"].size)
    return rows


@check("V22", needs=("prepare", "chat"), **PICTURES)
def test_rows_are_what_they_are_alone(
    case: Case, subject: Subject, measured: Measured, image_kit: str
) -> None:
    """A row of a batch with four pictures, none and one has the logits that it has alone.

    An invariant kept without a thread: features are matched to placeholders by order alone.
    """
    here = pictured(subject)
    model, rows = here.model(), rows_of_pictures()
    batch = chat(here, image_kit, rows)
    whole = here.eval_logits(model, batch)
    lengths = [len(chat(here, image_kit, [row])["input_ids"][0]) for row in rows]
    assert len(set(lengths)) == 3, f"{case.id}: the rows have lengths {lengths}"
    assert_differs(case.id, "rows", whole[0, : lengths[1]], whole[1, : lengths[1]], {})
    limit = tolerance("logits/padded", subject.numerics)
    for row, length in enumerate(lengths):
        alone = here.eval_logits(model, chat(here, image_kit, [rows[row]]))[0]
        assert_close(case.id, f"row {row}", whole[row, :length], alone, limit, measured)


@check(
    "V27",
    needs=("prepare", "chat"),
    **{**PICTURES, "models": ("gemma4-dense", "gemma4-unified", "gemma3-vlm", "qwen3_5")},
)
def test_a_picture_reaches_as_documented(
    case: Case, subject: Subject, measured: Measured, image_kit: str
) -> None:
    """A processor's picture, longer than the window, is seen both ways on the documented layers.

    https://github.com/huggingface/transformers/pull/46850
    """
    here = pictured(subject)
    part = {"type": "image", "image": processors.blank(80, 4)}
    batch = chat(here, image_kit, [[
        {"role": "user", "content": [part, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]])  # fmt: skip
    measured["placeholders"] = int((batch["input_ids"] == placeholder(here)).sum())
    assert measured["placeholders"] >= 4, f"{case.id}: too small a picture"
    assert_reach(case, here.model(), batch, measured, ("sliding_attention", "full_attention"))


def assert_lands(
    case: Case, model: Any, batch: dict[str, Any], key: str, token: int, measured: Measured
) -> None:
    """Other features under `key` move the embeddings at that token's places and no others."""
    places = batch["input_ids"] == token
    measured["placeholders"] = int(places.sum())
    assert places.any(), f"{case.id}: no placeholder"
    rng = torch.Generator().manual_seed(0)  # no scale and shift: a norm would take them out
    other = {**batch, key: batch[key] + torch.rand(batch[key].shape, generator=rng).to(batch[key])}
    moved = (embeddings(model, batch) != embeddings(model, other)).any(-1)
    wrong = int((moved != places).sum())
    assert not wrong, f"{case.id}: {wrong} places moved or stayed against the placeholders"


@check("V28", needs=("prepare", "chat"), **SOUNDS)
def test_sounds_have_their_places(
    case: Case, subject: Subject, measured: Measured, sound_kit: str
) -> None:
    """Sounds of several lengths in one batch fill exactly their own placeholders.

    https://github.com/huggingface/transformers/issues/45242
    """
    rows = [
        processors.conversation([{"type": "audio", "audio": processors.sound(n)}], index=i, turns=1)
        for i, n in enumerate((400, 1601, 5003))
    ]
    batch = chat(subject, sound_kit, rows)
    token = placeholder(subject, "audio")
    counts = (batch["input_ids"] == token).sum(1).tolist()
    assert len(set(counts)) == 3 and min(counts) > 0, f"{case.id}: {counts} placeholders"
    model = subject.model().eval()
    got = model_sounds(model, batch)
    assert got == sum(counts), f"{case.id}: {sum(counts)} placeholders, {got} features"
    # a sound's features are mixed along it, so all of its places move at once
    assert_lands(case, model, batch, "input_features", token, measured)


def model_sounds(model: Any, batch: dict[str, Any]) -> int:
    """How many vectors of sound the model makes of a batch."""
    inner = unwrapped(model).model
    with torch.no_grad():
        found = inner.get_audio_features(batch["input_features"], batch["input_features_mask"])
    mask: Tensor = found.attention_mask
    return int(mask.sum())


@check("V29", needs=("prepare", "chat"), **VIDEOS)
def test_videos_have_their_places(
    case: Case, subject: Subject, measured: Measured, video_kit: str
) -> None:
    """Videos of several lengths fill exactly their own placeholders, frame by frame.

    https://github.com/modelscope/ms-swift/pull/8237
    """
    here = pictured(subject)
    rows = [
        processors.conversation([{"type": "video", "video": film(n)}], index=i, turns=1)
        for i, n in enumerate((4, 6))
    ]
    batch = chat(here, video_kit, rows)
    token = placeholder(here, "video")
    labels = int((batch["labels"] == token).sum())
    assert not labels, f"{case.id}: {labels} places of a video are labelled"
    assert_lands(case, here.model().eval(), batch, "pixel_values_videos", token, measured)


def film(frames: int) -> Any:
    """Wide frames."""
    return processors.film(frames, 24, 40)


@check("V30", models=("gemma3n",), marks=("vision",))
def test_fixed_counts_are_the_configs(case: Case, measured: Measured) -> None:
    """Where every picture and sound has one number of placeholders, it is the config's.

    families.md §5 (the tower needs timm, so no model is asked)
    """
    import transformers

    config = transformers.Gemma3nConfig()
    tokenizer = processors.tokenizer_of(processors.processor("gemma3n"))
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(),
        processors.processor("gemma3n").image_processor,
        tokenizer,
        chat_template=tokenizer.chat_template,
    )
    parts = [
        {"type": "image", "image": processors.picture("wide")},
        {"type": "audio", "audio": processors.sound(3000)},
    ]
    ids = processor.apply_chat_template(
        processors.conversation(parts, turns=1), tokenize=True, return_dict=True
    )["input_ids"][0]
    found = {t: list(ids).count(getattr(tokenizer, f"{t}_token_id")) for t in ("image", "audio")}
    measured.update(found)
    want = {
        "image": config.vision_soft_tokens_per_image,
        "audio": config.audio_soft_tokens_per_image,
    }
    assert found == want, f"{case.id}: {found} placeholders, the config says {want}"
