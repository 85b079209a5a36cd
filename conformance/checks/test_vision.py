"""Images: where features land, which positions see which, what is frozen."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from conformance.case import Case
from conformance.check import check
from conformance.numerics import assert_close, assert_differs, assert_equal, relative_error
from conformance.subject import Subject
from conformance.tolerances import tolerance

IMAGES = ("images",)
Measured = dict[str, float]


def image_span(subject: Subject, ids: torch.Tensor) -> list[int]:
    """Positions of image placeholders in a row of token ids (S,)."""
    images = subject.model_spec.images
    assert images is not None
    return (ids == images.token_id).nonzero().flatten().tolist()


@check("V01", needs=("prepare", "loss"), traits=("vision",), marks=("vision",))
def test_text_only_training_works(case: Case, subject: Subject, measured: Measured) -> None:
    """Training on text alone needs no multimodal argument and equals the text model.

    https://github.com/huggingface/trl/issues/4142
    """
    batch = {k: v for k, v in subject.batch("text").items() if "type_ids" not in k}
    assert not any("pixel" in key for key in batch), f"{case.id}: the batch has images"
    got = subject.step(subject.model(batch="text"), batch)
    stock = subject.stock("float32").train()
    inner: Any = stock
    hidden = inner.model.language_model(
        input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False
    ).last_hidden_state
    logits = inner.lm_head(hidden).float()
    cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    labels = batch["labels"][:, 1:].reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)
    assert_close(
        case.id, "loss", torch.tensor(got.loss), loss, tolerance("loss/same-model"), measured
    )


@check("V02", needs=("prepare",), traits=("vision",), settings=IMAGES, marks=("vision",))
def test_features_land_on_their_placeholders(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """Other pixels move the embeddings at the placeholders and nowhere else.

    https://github.com/huggingface/transformers/issues/34625
    """
    model = subject.model().eval()
    batch = subject.batch()
    first, second = (embeddings(model, b) for b in (batch, repainted(batch)))
    places = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    for row, ids in enumerate(batch["input_ids"]):
        places[row, image_span(subject, ids)] = True
    moved = (first - second).abs().amax(-1) > 0
    assert places.any(), f"{case.id}: the batch has no image"
    measured["placeholders"] = int(places.sum())
    assert not moved[~places].any(), f"{case.id}: {int(moved[~places].sum())} other positions moved"
    assert moved[places].all(), f"{case.id}: {int((~moved[places]).sum())} placeholders did not"


def repainted(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with other pixels in every image."""
    return {k: v.flip(-1) * 0.5 + 0.25 if k == "pixel_values" else v for k, v in batch.items()}


def embeddings(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What the decoder gets as input embeddings (B, S, H), caught at its first layer."""
    caught: list[torch.Tensor] = []

    def catch(module: Any, args: Any, kwargs: Any) -> None:
        caught.append(kwargs.get("hidden_states", args[0] if args else None))

    layer = next(m for n, m in model.named_modules() if n.endswith("language_model.layers.0"))
    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


@check("V03", needs=("prepare",), traits=("vision",), settings=IMAGES, marks=("vision",))
def test_count_mismatch_raises(case: Case, subject: Subject) -> None:
    """A placeholder too few is an error, never a silent shift of the features.

    https://github.com/huggingface/transformers/issues/35779
    """
    model = subject.model()
    batch = subject.batch()
    subject.eval_logits(model, batch)
    row = next(r for r, ids in enumerate(batch["input_ids"]) if image_span(subject, ids))
    broken = dict(batch, input_ids=batch["input_ids"].clone())
    broken["input_ids"][row, image_span(subject, batch["input_ids"][row])[0]] = 5
    try:
        subject.eval_logits(model, broken)
    except subject.declines(ValueError, RuntimeError):
        return
    raise AssertionError(f"{case.id}: a batch with one placeholder too few was accepted")


@check("V04", needs=("prepare", "loss"), traits=("vision",), settings=IMAGES, marks=("vision",))
def test_missing_type_ids_are_loud_or_harmless(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """Leaving out the modality type ids beside an image raises, warns, or changes nothing.

    https://github.com/huggingface/transformers/pull/45454
    """
    images = subject.model_spec.images
    assert images is not None
    model, batch = subject.model(), subject.batch()
    want = subject.loss(model, batch)
    without = {k: v for k, v in batch.items() if k != images.type_ids}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = subject.loss(model, without)
        except subject.declines(ValueError):
            return
    if any("type_ids" in str(w.message) for w in caught):
        return
    assert_equal(case.id, "loss without type ids", got, want, measured)


@check("V05", needs=("prepare",), traits=("vision",), settings=IMAGES, marks=("vision",))
def test_bidirectional_where_documented(case: Case, subject: Subject, measured: Measured) -> None:
    """A later token of an image block reaches an earlier one exactly where the family says so.

    families.md §8: gemma3 on every layer, gemma4 'vision' on sliding layers, qwen3.5 and E2B none
    """
    model = subject.model().eval()
    batch = subject.batch()
    row = next(r for r, ids in enumerate(batch["input_ids"]) if len(image_span(subject, ids)) > 1)
    span = image_span(subject, batch["input_ids"][row])
    shift = torch.zeros_like(embeddings(model, batch))
    shift[row, span[1]] = 1.0
    plain, moved = (shifted_logits(model, batch, s) for s in (None, shift))
    assert_differs(case.id, "later token itself", moved[row, span[1]], plain[row, span[1]], {})
    reached = relative_error(moved[row, span[0]], plain[row, span[0]]).frobenius
    measured["earlier token moved by"] = reached
    expected = "bidirectional_images" in subject.model_spec.traits
    kind = "logits/regrouped" if "moe" in subject.numerics else "exact"
    noise = tolerance(kind, subject.numerics)
    assert (reached > noise.limit) == expected, (
        f"{case.id}: the earlier token moved by {reached:.3g}; bidirectional is {expected}"
    )


def shifted_logits(model: Any, batch: dict[str, Any], shift: torch.Tensor | None) -> torch.Tensor:
    """Logits (B, S, V) with `shift` (B, S, H) added to the first decoder layer's input."""

    def add(module: Any, args: Any, kwargs: Any) -> Any:
        if shift is None:
            return None
        if "hidden_states" in kwargs:
            return args, dict(kwargs, hidden_states=kwargs["hidden_states"] + shift)
        return (args[0] + shift, *args[1:]), kwargs

    layer = next(m for n, m in model.named_modules() if n.endswith("language_model.layers.0"))
    handle = layer.register_forward_pre_hook(add, with_kwargs=True)
    try:
        with torch.no_grad():
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    assert isinstance(logits, torch.Tensor)
    return logits


@check(
    "V06",
    needs=("plan", "prepare", "loss"),
    traits=("vision",),
    settings=("images", "lora+images"),
    marks=("vision",),
)
def test_frozen_towers(case: Case, subject: Subject, measured: Measured) -> None:
    """Frozen towers get no gradient, do not change in a step, and stay in evaluation mode.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3584
    """
    model = subject.model(options={"freeze_mm_modules": True})
    tower = {
        name: p
        for name, p in model.named_parameters()
        if set(name.split(".")) & set(subject.model_spec.freeze)
    }
    assert tower, f"{case.id}: the model has no tower"
    before = {name: p.detach().clone() for name, p in tower.items()}
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    subject.loss(model, subject.batch()).backward()
    optimizer.step()
    measured["tower parameters"] = len(tower)
    learning = [n for n, p in tower.items() if p.requires_grad or p.grad is not None]
    assert not learning, f"{case.id}: {len(learning)} tower parameters learn: {learning[0]}"
    changed = [n for n, p in tower.items() if not torch.equal(p, before[n])]
    assert not changed, f"{case.id}: {len(changed)} tower parameters changed: {changed[0]}"
    training = [
        name
        for name, module in model.named_modules()
        if name and set(name.split(".")) & set(subject.model_spec.freeze) and module.training
    ]
    assert not training, f"{case.id}: {training[0]} is in training mode"


@check("V07", needs=("prepare",), traits=("vision",), settings=IMAGES, marks=("vision",))
def test_images_follow_their_placeholders(case: Case, subject: Subject, measured: Measured) -> None:
    """Rows in another order give the same logits in that order: each image stays with its row.

    An invariant kept without a thread: features are matched to placeholders by order alone.
    """
    model = subject.model()
    samples = subject.samples("images", count=4)  # of three, a shift by one image would do
    plan = subject.plan()
    dtype = case.setting.dtype
    forward = subject.eval_logits(model, subject.to(subject.collate(samples, plan), dtype))
    turned = subject.collate(samples[::-1], plan)
    backward = subject.eval_logits(model, subject.to(turned, dtype))
    assert_differs(case.id, "order", forward, backward, {})
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        got, want = backward[len(samples) - 1 - row, :length], forward[row, :length]
        limit = tolerance("logits/reordered", subject.numerics)
        assert_close(case.id, f"row {row}", got, want, limit, measured)


@check("V08", needs=("prepare",), traits=("vision",), settings=IMAGES, marks=("vision",))
def test_text_after_images_is_text(case: Case, subject: Subject, measured: Measured) -> None:
    """A text batch gives the same logits before and after a batch of images.

    An invariant kept without a thread: multimodal state (rope deltas) lives on the module.
    """
    model = subject.model()
    text, images = subject.batch("text"), subject.batch("images")
    before = subject.eval_logits(model, text)
    assert_differs(case.id, "images", subject.eval_logits(model, images).sum(), before.sum(), {})
    assert_equal(case.id, "text again", subject.eval_logits(model, text), before, measured)


@check("V12", needs=("plan", "prepare"), traits=("vision",), marks=("vision",))
def test_freeze_prefixes_cover_the_towers(case: Case, subject: Subject, measured: Measured) -> None:
    """The modules to freeze cover every parameter outside the decoder and none inside it.

    https://docs.axolotl.ai/docs/multimodal.html
    """
    model = subject.model(options={"freeze_mm_modules": True})
    names = [name for name, _ in model.named_parameters()]
    decoder = {n for n in names if "language_model" in n.split(".") or n.startswith("lm_head")}
    assert decoder, f"{case.id}: no decoder parameter"
    assert len(decoder) < len(names), f"{case.id}: no parameter outside the decoder"
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    measured["frozen"] = len(frozen)
    assert not frozen & decoder, f"{case.id}: freezes the decoder's {sorted(frozen & decoder)[0]}"
    left = sorted(set(names) - decoder - frozen)
    assert not left, f"{case.id}: leaves {len(left)} unfrozen, such as {left[0]}"
