"""What older versions wrote: adapters, checkpoints in every layout of keys, a trainer's state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from conformance.case import Case
from conformance.check import check
from conformance.golden import (
    KEPT,
    OPTIONS,
    PARAMETERS,
    TOTAL,
    Golden,
    golden_adapters,
    golden_checkpoints,
    golden_dir,
    trainer_plan,
    unpack_state,
)
from conformance.lora import adapters
from conformance.numerics import assert_close, assert_differs
from conformance.subject import Subject
from conformance.tolerances import tolerance

Measured = dict[str, float]
Unsupported = Callable[[str], None]
LORA: dict[str, Any] = {
    "settings": ("lora", "lora-experts"),
    "models": ("gemma4-moe", "mixtral"),
}
DROPPED = ("missing", "unexpected", "not used", "newly initialized", "ignored")


def kinds(case: Case) -> tuple[str, ...]:
    """Folder names of the golden adapters of a case's model and setting."""
    assert case.model is not None
    name = f"{case.model.name}-{case.setting.tuning}"
    return (name, f"{name}-saved")


def loaded(subject: Subject, golden: Golden) -> Any:
    """The adapter in a fresh base model; AssertionError if loading warns that something is lost."""
    base = subject.model(tuning="full")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = subject.impl.load(base, golden.folder)
    lost = [str(w.message) for w in caught if any(w_ in str(w.message).lower() for w_ in DROPPED)]
    name = f"{golden.made_by}/{golden.folder.name}"
    assert not lost, f"{subject.case.id}: {name}: loading warned: {lost[0][:200]}"
    return model


def logits_of(subject: Subject, model: Any, golden: Golden) -> Tensor:
    """The model's logits on the artefact's own input ids."""
    ids = golden.expected["input_ids"].to(subject.device)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        images = subject.model_spec.images
        if images is not None and images.type_ids == name:
            batch[name] = torch.zeros_like(ids)
    return subject.eval_logits(model, batch).cpu()


@check("C04", needs=("build", "prepare", "load"), **LORA)
def test_old_adapters_load(
    case: Case, subject: Subject, measured: Measured, unsupported: Unsupported
) -> None:
    """Adapters that older versions wrote load whole and give the logits that were stored then.

    https://github.com/huggingface/peft/issues/3083
    """
    found = golden_adapters(kinds(case))
    assert any(golden_dir().glob("*/*-lora*")), f"{case.id}: no adapters in fixtures/golden"
    if not found:
        unsupported("every golden adapter was written by something newer than what is installed")
    stock, bases = subject.model(tuning="full"), dict[str, Tensor]()
    for golden in found:
        name, want = f"{golden.made_by}/{golden.folder.name}", golden.expected
        tokens = str(want["input_ids"].tolist())
        if tokens not in bases:
            bases[tokens] = logits_of(subject, stock, golden)
        base = bases[tokens]
        limit = tolerance("logits/golden", subject.numerics)
        assert_close(case.id, f"{name} base", base, want["base"], limit, measured)
        assert_differs(case.id, f"{name} stored", want["logits"], want["base"], {})
        model = loaded(subject, golden)
        assert_close(
            case.id, name, logits_of(subject, model, golden), want["logits"], limit, measured
        )
        factors = sum("lora_" in key for key in golden.tensors)
        arrived = len(adapters(model))
        assert arrived == factors, f"{case.id}: {name}: {arrived} of {factors} factors arrived"


@check("C11", needs=("build", "prepare", "load", "save"), correctness=False, **LORA)
def test_old_versions_would_know_the_keys(
    case: Case, subject: Subject, measured: Measured, tmp_path: Path
) -> None:
    """Advice: an adapter saved now has the keys and shapes that older versions wrote and read.

    https://github.com/huggingface/peft/issues/3083
    """
    for golden in golden_adapters(kinds(case)):
        name = f"{golden.made_by}/{golden.folder.name}"
        out = tmp_path / golden.made_by / golden.folder.name
        subject.impl.save(loaded(subject, golden), out)
        now = load_file(out / "adapter_model.safetensors")
        assert now, f"{case.id}: {name}: nothing was written"
        old = golden.tensors
        measured[f"keys unknown to {name}"] = len(set(now) ^ set(old))
        apart = [key for key in set(now) & set(old) if now[key].shape != old[key].shape]
        measured[f"shapes unknown to {name}"] = len(apart)


@check("C12", needs=("plan", "build", "prepare", "resume"), models=("gemma3-text",),
       settings=("lora",), marks=("training",))  # fmt: skip
def test_kept_training_goes_on(
    case: Case, subject: Subject, measured: Measured, tmp_path: Path
) -> None:
    """A training whose state was kept under another version ends in the parameters of then.

    https://github.com/huggingface/transformers/issues/48805
    """
    kept = golden_dir() / "trainer-state"
    want = load_file(kept / PARAMETERS)
    plan = trainer_plan(subject)
    model = subject.model(plan=plan)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name in want}
    assert set(start) == set(want), f"{case.id}: other parameters are trained: {len(start)}"
    checkpoint = tmp_path / f"checkpoint-{KEPT}"
    unpack_state(kept, checkpoint)
    subject.impl.resume(
        model,
        subject.samples("text", count=TOTAL),
        plan,
        steps=TOTAL,
        resume=str(checkpoint),
        output_dir=tmp_path / "out",
        **OPTIONS,
    )
    got, limit = dict(model.named_parameters()), tolerance("parameters/golden")
    for name, value in want.items():
        assert_differs(case.id, f"{name} start", start[name].cpu(), value, {})
        assert_close(case.id, name, got[name].detach().cpu(), value, limit, measured)


@check("C13", needs=("plan", "build"), models=("mixtral", "gemma3-vlm"))
def test_every_layout_of_keys_loads(case: Case, subject: Subject, measured: Measured) -> None:
    """A checkpoint loads in each layout of keys that was ever published, with the stored logits.

    https://github.com/huggingface/transformers/issues/38927
    """
    assert case.model is not None
    found = golden_checkpoints(case.model.name)
    assert found, f"{case.id}: no golden checkpoint in fixtures/golden"
    plan = subject.plan()
    for golden in found:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = subject.impl.build(golden.folder, plan).to(subject.device).float()
        lost = [str(w.message) for w in caught if "missing" in str(w.message).lower()]
        assert not lost, f"{case.id}: {golden.folder.name}: {lost[:1]}"
        got, want = logits_of(subject, model, golden), golden.expected["logits"]
        assert want.std() > 0, f"{case.id}: {golden.folder.name}: constant logits"
        assert_close(
            case.id,
            golden.folder.name,
            got,
            want,
            tolerance("logits/golden", subject.numerics),
            measured,
        )
