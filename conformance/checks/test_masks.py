"""Attention: which token sees which, by perturbation, by gradient, and against the mask oracle."""

from __future__ import annotations

from typing import Any

import torch

from conformance.case import Case
from conformance.check import check
from conformance.checks.probes import (
    Measured,
    assert_reach,
    changed,
    head_evidence,
    layers_of,
    text_config,
    unwrapped,
    without_labels,
)
from conformance.numerics import (
    assert_close,
    assert_close_gradients,
    assert_differs,
    relative_error,
)
from conformance.oracles.cross_entropy import linear_cross_entropy
from conformance.subject import Subject, gradients
from conformance.tolerances import tolerance
from conformance.weights import canonical_name

KINDS = ("sliding_attention", "full_attention", "linear_attention")


@check("A01", needs=("prepare",), settings=("-", "images"))
def test_the_future_is_invisible(case: Case, subject: Subject, measured: Measured) -> None:
    """Another token at t leaves the logits before t as they are.

    https://github.com/huggingface/accelerate/issues/4177
    """
    model = subject.model()
    batch = subject.batch()
    at = batch["input_ids"].shape[1] - 3
    base = subject.eval_logits(model, batch)
    moved = subject.eval_logits(model, changed(batch, 0, at, subject.model_spec))
    assert_differs(case.id, "logits from t on", moved[0, at:], base[0, at:], measured)
    row = tolerance("logits/regrouped" if "moe" in subject.numerics else "exact")
    assert_close(case.id, "logits before t", moved[0, :at], base[0, :at], row, measured)


@check("A02", needs=("prepare",))
def test_padding_side_is_irrelevant(case: Case, subject: Subject, measured: Measured) -> None:
    """Padding on the left or on the right leaves the logits of real tokens as they are.

    https://github.com/huggingface/transformers/issues/44384
    """
    model = subject.model()
    ids = subject.batch("text")["input_ids"]
    want = subject.eval_logits(model, {"input_ids": ids})
    pad = torch.zeros_like(ids[:, :4])
    for side in ("left", "right"):
        parts = (pad, ids) if side == "left" else (ids, pad)
        mask = torch.cat(
            [torch.zeros_like(p) if p is pad else torch.ones_like(p) for p in parts], 1
        )
        got = subject.eval_logits(model, {"input_ids": torch.cat(parts, 1), "attention_mask": mask})
        real = got[:, 4:] if side == "left" else got[:, :-4]
        assert_close(case.id, side, real, want, tolerance("logits/padded"), measured)


@check("A03", needs=("prepare",), settings=("padded",))
def test_padded_tokens_are_invisible(case: Case, subject: Subject, measured: Measured) -> None:
    """What stands at padded positions is irrelevant to the loss and to every gradient.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3735
    """
    model = subject.model()
    batch = subject.batch()
    hidden = batch["attention_mask"] == 0
    assert hidden.any(), f"{case.id}: the batch has no padding"
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 7)}
    one, two = (subject.eval_logits(model, b) for b in (batch, other))
    assert_differs(case.id, "logits of padding", two[hidden], one[hidden], measured)
    row = tolerance("logits/regrouped" if "moe" in subject.numerics else "exact")
    assert_close(case.id, "logits", two[~hidden], one[~hidden], row, measured)


FLEX_WIDTH = 16
"""torch's flex attention has no kernel for narrower heads (seen on an H100, torch 2.11)."""


def attend_by(model: torch.nn.Module, name: str) -> None:
    """Switch the attention of text and vision; audio encoders have none but eager, and towers with
    heads too narrow for flex stay with sdpa."""
    inner = unwrapped(model)
    parts = {part: getattr(inner.config, part, None) for part in inner.config.sub_configs}
    has = {part: name for part, config in parts.items() if config and part != "audio_config"}
    tower = parts.get("vision_config")
    if name == "flex_attention" and tower and "vision_config" in has:
        named = [getattr(tower, name, None) for name in ("num_attention_heads", "num_heads")]
        heads = next(filter(None, named), None)  # gemma4-unified's tower has none
        if heads and tower.hidden_size // heads < FLEX_WIDTH:
            has["vision_config"] = "sdpa"
    inner.set_attn_implementation(has or name)
    assert text_config(model)._attn_implementation == name


def attentions(subject: Subject, model: torch.nn.Module) -> list[str]:
    """The attention implementations to compare: flex needs a GPU and a class that supports it."""
    flex = subject.device == "cuda" and unwrapped(model)._supports_flex_attn
    return ["eager", "sdpa", *(["flex_attention"] if flex else [])]


@check("A04", needs=("prepare", "loss"), dealt=("padded", "images"))
def test_attention_implementations_agree(case: Case, subject: Subject, measured: Measured) -> None:
    """Eager and sdpa attention (on a GPU flex too) give the same logits and gradients.

    Text is compared with the stock class in eager; images with the implementation's own eager,
    since the masks of its images are what A06 judges, on every model: here they are dealt.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3598
    """
    batch = subject.batch()
    if case.setting.batch == "images":
        stock = subject.model()
        attend_by(stock, "eager")
    else:
        stock = subject.stock("float32").eval()  # transformers 5.5 trains no text without type ids
    stock(**batch, use_cache=False).loss.backward()
    want = gradients(stock)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    reference = subject.eval_logits(stock, batch)[real]
    for name in attentions(subject, stock):
        model = subject.model()
        attend_by(model, name)
        row = tolerance("gradients/attention", subject.numerics)
        got = subject.step(model, batch)
        trained = {canonical_name(n) for n, p in model.named_parameters() if p.requires_grad}
        share = {n: gradient for n, gradient in want.items() if n in trained}
        assert_close_gradients(case.id, got.gradients, share, row, measured, f"{name} gradients")
        logits = subject.eval_logits(model, batch)[real]
        row = tolerance("logits/attention")
        assert_close(case.id, f"{name} logits", logits, reference, row, measured)


@check("A05", needs=("prepare",), traits=("sliding_window",))
def test_window_is_exact(case: Case, subject: Subject, measured: Measured) -> None:
    """A sliding layer sees token t − w + 1 and not t − w; a full layer sees every token before.

    https://github.com/unslothai/unsloth-zoo/pull/635
    """
    model = subject.model()
    batch = subject.batch("text")
    window = int(text_config(model).sliding_window)
    length = batch["input_ids"].shape[1]
    assert 1 < window < length // 2, f"{case.id}: a window of {window} hides in {length} tokens"
    assert_reach(case, model, batch, measured, ("sliding_attention",))
    assert_reach(case, model, batch, measured, ("full_attention",))


@check("A06", needs=("prepare",), traits=("vision",), settings=("images",), marks=("vision",))
def test_images_see_both_ways_where_documented(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """Image tokens attend both ways exactly on the documented layers, across the window's edge too.

    https://github.com/huggingface/transformers/pull/46850
    """
    spec = subject.model_spec
    assert spec.images is not None
    batch = subject.batch()
    images = int((batch["input_ids"] == spec.images.token_id).sum())
    measured["image tokens"] = images
    assert images, f"{case.id}: the batch has no image"
    window = int(spec.text_config.get("sliding_window") or 0)
    measured["image wider than the window by"] = spec.images.tokens_per_image - window
    assert_reach(case, subject.model(), batch, measured, KINDS)


@check("A07", needs=("prepare",), traits=("sliding_window",))
def test_static_cache_changes_nothing(case: Case, subject: Subject, measured: Measured) -> None:
    """A static cache longer than the window gives the logits of no cache.

    https://github.com/huggingface/transformers/issues/45242
    """
    from transformers import StaticCache

    model = subject.model().eval()
    batch = without_labels(subject.batch("text"))
    want = subject.eval_logits(model, batch)
    length = batch["input_ids"].shape[1] + 5
    cache = StaticCache(config=unwrapped(model).config, max_cache_len=length)
    with torch.no_grad():
        got = model(**batch, past_key_values=cache, use_cache=True).logits
    assert int(cache.get_seq_length()) > 0, f"{case.id}: the cache was not used"
    assert_close(case.id, "logits", got, want, tolerance("logits/padded"), measured)


@check("A08", needs=("prepare",), settings=("-", "images"))
def test_attention_gets_flat_positions(case: Case, subject: Subject, measured: Measured) -> None:
    """No attention layer is given position ids of three rows.

    https://github.com/huggingface/transformers/issues/44643
    """
    model = subject.model()
    shapes: list[tuple[int, ...]] = []
    layers_seen = 0

    def look(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal layers_seen
        layers_seen += 1
        ids = kwargs.get("position_ids")
        shapes.extend([] if ids is None else [tuple(ids.shape)])

    layers = layers_of(model, subject.model_spec)
    attention = [m for layer in layers if (m := getattr(layer, "self_attn", None)) is not None]
    for module in attention:
        module.register_forward_pre_hook(look, with_kwargs=True)
    subject.eval_logits(model, subject.batch())
    assert layers_seen == len(attention) > 0, f"{case.id}: {layers_seen} attention layers ran"
    measured["dimensions"] = max((len(shape) for shape in shapes), default=0)
    assert all(len(s) <= 2 for s in shapes), f"{case.id}: position ids of shape {max(shapes)}"


@check("A09", needs=("prepare", "loss"), traits=("softcap",), settings=("-", "kernels"))
def test_softcap_is_applied(case: Case, subject: Subject, measured: Measured) -> None:
    """Final logits are capped, in the forward and in the gradient that the loss sends back.

    https://github.com/apple/ml-cross-entropy/pull/48
    """
    model = subject.model()
    cap = float(text_config(model).final_logit_softcapping)
    batch = subject.batch("text")
    with torch.no_grad():
        head = unwrapped(model).get_output_embeddings().weight
        head *= 20 / head.std() / head.shape[1] ** 0.5
    logits = subject.eval_logits(model, batch)
    found = head_evidence(subject, model, batch)
    raw = torch.einsum("bsh,vh->bsv", found.hidden.double(), found.weight.detach().double())
    measured["largest raw logit / cap"] = float(raw.abs().max()) / cap
    assert raw.abs().max() > 1.2 * cap, f"{case.id}: nothing to cap"
    capped = cap * torch.tanh(raw / cap)
    assert_close(case.id, "logits", logits, capped, tolerance("logits/same-model"), measured)
    want = linear_cross_entropy(
        found.hidden[:, :-1].flatten(0, 1),
        found.weight,
        batch["labels"][:, 1:].flatten(),
        softcap=cap,
    )
    got = found.gradient[:, :-1].flatten(0, 1)
    uncapped = linear_cross_entropy(
        found.hidden[:, :-1].flatten(0, 1), found.weight, batch["labels"][:, 1:].flatten()
    )
    measured["effect"] = relative_error(uncapped.hidden, want.hidden).frobenius
    assert measured["effect"] > 0.1, f"{case.id}: the cap does not matter here"
    assert_close(case.id, "gradient", got, want.hidden, tolerance("gradients/head"), measured)
