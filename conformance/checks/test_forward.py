"""The forward pass and its gradients: the same by every way to ask for them."""

from __future__ import annotations

import math

import torch

from conformance.case import Case
from conformance.check import check
from conformance.checks.probes import (
    Measured,
    changed,
    declined,
    finite,
    layers_of,
    unwrapped,
    without_labels,
)
from conformance.numerics import (
    assert_close,
    assert_close_step,
    assert_differs,
    assert_equal,
    global_norm,
)
from conformance.subject import Subject
from conformance.tolerances import EXACT, tolerance

CHECKPOINTED = (
    "lora+ckpt-nonreentrant",
    "lora+ckpt-reentrant",
    "lora-experts+ckpt-nonreentrant",
    "ckpt-nonreentrant+images",
    "ckpt-reentrant+images",
)
REPEATED = ("lora", "lora-experts", "kernels", "lora+kernels", "lora-experts+kernels")


@check(
    "M01",
    needs=("prepare", "loss"),
    varies=("dtype", "tuning", "kernels"),
    pairs_over="family",
)
def test_builds_and_steps(case: Case, subject: Subject, measured: Measured) -> None:
    """The model builds, takes a step, and its loss starts near ln V.

    https://github.com/huggingface/trl/issues/5421
    """
    model = subject.model()
    step = subject.step(model, subject.batch())
    uniform = math.log(unwrapped(model).get_output_embeddings().weight.shape[0])
    assert step.loss is not None and finite(step), f"{case.id}: loss {step.loss}, or a gradient"
    assert global_norm(step.gradients) > 0, f"{case.id}: no gradient at all"
    loss = torch.tensor(step.loss)
    assert_close(
        case.id, "loss/ln V", loss, torch.full_like(loss, uniform), tolerance("loss/ln V"), measured
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trainable]
    torch.optim.SGD(trainable, lr=1.0).step()
    moved = sum(not torch.equal(p, q) for p, q in zip(trainable, before, strict=True))
    measured["moved parameters"] = moved
    assert moved, f"{case.id}: the optimizer step moved no parameter"


@check("M02", needs=("prepare", "loss"), dealt=REPEATED)
def test_is_deterministic(case: Case, subject: Subject, measured: Measured) -> None:
    """Two runs of the same step give the same loss and gradients to the last bit.

    https://github.com/huggingface/transformers/issues/34191
    """
    batch = subject.batch()
    model = subject.model()
    one, two = subject.step(subject.model(), batch), subject.step(model, batch)
    assert global_norm(one.gradients) > 0, f"{case.id}: no gradient to compare"
    assert_close_step(case.id, one, two, EXACT, measured)
    first, second = (subject.eval_logits(model, batch) for _ in range(2))
    assert_equal(case.id, "eval logits", first, second, measured)


@check("M03", needs=("prepare",))
def test_embeddings_as_input(case: Case, subject: Subject, measured: Measured) -> None:
    """A forward from `inputs_embeds` equals the one from `input_ids`, or is declined loudly.

    live defect L12 (Gemma 3n leaves the per-layer inputs out)
    """
    model = subject.model().eval()
    batch = subject.batch("text")
    want = subject.eval_logits(model, batch)
    embedded = unwrapped(model).get_input_embeddings()(batch["input_ids"]).detach()
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    if declined(subject, lambda: _forward_embeddings(subject, model, embedded, rest), measured):
        return
    got = subject.eval_logits(model, {**rest, "inputs_embeds": embedded})
    assert_differs(case.id, "logits over tokens", want[:, 1:], want[:, :-1], measured)
    assert_close(case.id, "logits", got, want, tolerance("logits/same-model"), measured)


def _forward_embeddings(
    subject: Subject, model: torch.nn.Module, embedded: torch.Tensor, rest: dict[str, object]
) -> None:
    subject.eval_logits(model, {**rest, "inputs_embeds": embedded})


@check("M04", needs=("prepare",), settings=("-", "images"))
def test_cache_changes_nothing(case: Case, subject: Subject, measured: Measured) -> None:
    """`use_cache` on gives the logits of `use_cache` off, in training and in evaluation.

    https://github.com/huggingface/transformers/issues/45242
    """
    inputs = without_labels(subject.batch())
    for train in (True, False):
        model = subject.model().train(train)
        off = model(**inputs, use_cache=False).logits
        held = model(**inputs, use_cache=True)
        assert held.past_key_values is not None, f"{case.id}: no cache came back"
        what = "train logits" if train else "eval logits"
        assert_close(case.id, what, held.logits, off, tolerance("logits/same-model"), measured)


@check(
    "M05",
    needs=("prepare", "loss"),
    settings=("ckpt-nonreentrant", "ckpt-reentrant"),
    dealt=CHECKPOINTED,
)
def test_checkpointing_keeps_gradients(case: Case, subject: Subject, measured: Measured) -> None:
    """Checkpointing leaves the loss and every gradient as they are.

    live defect L1; https://github.com/unslothai/unsloth-zoo/pull/813
    """
    batch = subject.batch()
    want = subject.plain_step(checkpointing="off")
    model = subject.model()
    passes = [0]
    norm = layers_of(model, subject.model_spec)[0].get_submodule("input_layernorm")
    norm.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    got = subject.step(model, batch)
    measured["forward passes of a layer"] = passes[0]
    assert passes[0] == 2, f"{case.id}: a layer ran {passes[0]} times, 2 when it is checkpointed"
    assert_close_step(case.id, got, want, EXACT, measured)


@check(
    "M06",
    needs=("prepare", "loss"),
    settings=("ckpt-nonreentrant",),
    dealt=("lora+ckpt-nonreentrant",),
)
def test_recomputation_leaves_a_cache_alone(
    case: Case, subject: Subject, measured: Measured
) -> None:
    """A cache passed to a checkpointed forward is not updated a second time by recomputation.

    https://github.com/huggingface/transformers/issues/36040
    """
    from transformers import DynamicCache

    batch = subject.batch("text")
    want = subject.step(subject.model(), batch)
    model = subject.model()
    cache = DynamicCache(config=unwrapped(model).config)
    got = subject.step(model, {**batch, "past_key_values": cache, "use_cache": True})
    length = int(cache.get_seq_length())
    measured["cache length"] = length
    assert length in (0, batch["input_ids"].shape[1]), f"{case.id}: the cache holds {length} tokens"
    assert_close_step(case.id, got, want, EXACT, measured)


@check("M07", needs=("prepare",))
def test_decoding_equals_the_forward(case: Case, subject: Subject, measured: Measured) -> None:
    """Decoding token by token gives the logits of the whole forward, past the window too.

    https://github.com/ml-explore/mlx-lm/issues/1674
    """
    model = subject.model().eval()
    ids = subject.batch("text")["input_ids"]
    window = subject.model_spec.text_config.get("sliding_window") or 0
    assert ids.shape[1] > 2 * window, f"{case.id}: {ids.shape[1]} tokens do not pass the window"
    want = subject.eval_logits(model, {"input_ids": ids})
    cache, rows = None, []
    with torch.no_grad():
        for at in range(ids.shape[1]):
            out = model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits)
    assert_close(
        case.id,
        "logits",
        torch.cat(rows, 1),
        want,
        tolerance("logits/decoded", subject.numerics),
        measured,
    )


@check("M08", needs=("prepare",))
def test_logits_to_keep_is_a_slice(case: Case, subject: Subject, measured: Measured) -> None:
    """`logits_to_keep` gives the last logits of the whole forward, by count and by position.

    axolotl 0.21.0 (logits_to_keep on the fast path of shared keys and values)
    """
    model = subject.model().eval()
    batch = without_labels(subject.batch("text"))
    want = subject.eval_logits(model, batch)
    places = torch.tensor([1, 4, want.shape[1] - 1])
    for what, keep, slice_ in (("count", 3, want[:, -3:]), ("positions", places, want[:, places])):
        with torch.no_grad():
            got = model(**batch, use_cache=False, logits_to_keep=keep).logits
        assert got.shape == slice_.shape, f"{case.id}: {what}: {tuple(got.shape)}"
        assert_close(case.id, what, got, slice_, tolerance("logits/same-model"), measured)


@check("M09", needs=("prepare", "loss"), settings=("-", "images"))
def test_order_of_batches_is_irrelevant(case: Case, subject: Subject, measured: Measured) -> None:
    """A text batch gives the same step first, and after another batch (with images, where taken).

    live defect L26 (one global slot for shared keys and values)
    """
    text = subject.batch("text")
    want = subject.plain_step(batch="text")
    model = subject.model()
    other = subject.batch() if case.setting.batch != "text" else subject.batch("padded")
    before = subject.step(model, changed(other, 0, 1, subject.model_spec))
    assert before.loss != want.loss, f"{case.id}: the other batch is the same batch"
    subject.eval_logits(model, other)
    assert_close_step(case.id, subject.step(model, text), want, EXACT, measured)
