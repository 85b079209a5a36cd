"""Checkpoints and adapters on disk: what is written is what comes back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from conformance.case import Case
from conformance.check import check
from conformance.lora import adapters
from conformance.numerics import assert_close, assert_differs, assert_equal
from conformance.subject import Subject
from conformance.tolerances import tolerance

Measured = dict[str, float]
LORA = ("lora", "lora-experts")


def keys_on_disk(path: Path) -> set[str]:
    """Tensor names in every safetensors file of a directory."""
    found: set[str] = set()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= set(tensors.keys())
    return found


@check("C01", needs=("build", "save", "load"), dealt=("bf16",))
def test_round_trip_is_bitwise(
    case: Case, subject: Subject, measured: Measured, tmp_path: Path
) -> None:
    """Every weight that is saved loads bit-equal, dtype included.

    https://github.com/huggingface/transformers/issues/48075
    """
    model = subject.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    subject.impl.save(model, tmp_path)
    again = subject.impl.load(subject.model(), tmp_path)
    got = dict(again.named_parameters())
    assert set(got) == set(want), f"{case.id}: {sorted(set(got) ^ set(want))[:3]}"
    for name, value in want.items():
        assert got[name].dtype == value.dtype, f"{case.id}: {name} came back as {got[name].dtype}"
        assert_equal(case.id, name, got[name], value, {})
    measured["parameters"] = len(want)


@check("C02", needs=("build", "save", "load"))
def test_saving_twice_gives_the_same_keys(case: Case, subject: Subject, tmp_path: Path) -> None:
    """Save, load, save: the same keys on disk.

    https://github.com/huggingface/transformers/issues/46650
    """
    model = subject.model()
    subject.impl.save(model, tmp_path / "first")
    again = subject.impl.load(subject.model(), tmp_path / "first")
    subject.impl.save(again, tmp_path / "second")
    first, second = keys_on_disk(tmp_path / "first"), keys_on_disk(tmp_path / "second")
    assert first, f"{case.id}: nothing was written"
    assert first == second, f"{case.id}: keys differ: {sorted(first ^ second)[:4]}"


@check("C03", needs=("build", "save"))
def test_fresh_and_loaded_models_save_the_same_keys(
    case: Case, subject: Subject, tmp_path: Path
) -> None:
    """A model made from its config and one loaded from disk are saved under the same keys.

    https://github.com/modelscope/ms-swift/issues/9877
    """
    subject.impl.save(subject.stock("float32"), tmp_path / "fresh")
    subject.impl.save(subject.model(), tmp_path / "loaded")
    fresh, loaded = keys_on_disk(tmp_path / "fresh"), keys_on_disk(tmp_path / "loaded")
    assert fresh, f"{case.id}: nothing was written"
    assert fresh == loaded, f"{case.id}: keys differ: {sorted(fresh ^ loaded)[:4]}"


@check("C06", needs=("prepare", "save", "load"), settings=LORA)
def test_loaded_adapter_acts(
    case: Case, subject: Subject, measured: Measured, tmp_path: Path
) -> None:
    """A loaded adapter gives the logits that it was saved with, and they differ from the base's.

    https://github.com/vllm-project/vllm/issues/41384
    """
    model = subject.model()
    batch = subject.batch()
    want = subject.eval_logits(model, batch)
    subject.impl.save(model, tmp_path)
    base = subject.model(tuning="full")
    assert_differs(case.id, "adapter", want, subject.eval_logits(base, batch), {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = subject.impl.load(base, tmp_path)
    missing = [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    assert not missing, f"{case.id}: loading warned: {missing[0][:200]}"
    got = subject.eval_logits(again, batch)
    assert_close(case.id, "logits", got, want, tolerance("logits/reloaded"), measured)
    factors = {n: p.detach() for n, p in adapters(model).items()}
    for name, parameter in adapters(again).items():
        assert_equal(case.id, name, parameter, factors[name], {})


@check(
    "C05", needs=("prepare", "save", "load"), settings=LORA, models=("gemma4-text", "qwen3_5-text")
)
def test_adapter_of_another_class_is_loud_or_right(
    case: Case, subject: Subject, measured: Measured, tmp_path: Path
) -> None:
    """An adapter with keys of the multimodal class loads rightly into the text class, or loudly.

    https://github.com/hiyouga/LLaMA-Factory/issues/10294
    """
    model = subject.model()
    batch = subject.batch()
    want = subject.eval_logits(model, batch)
    subject.impl.save(model, tmp_path)
    renamed = nest_keys(tmp_path)
    assert renamed, f"{case.id}: no key of the adapter could be nested"
    base = subject.model(tuning="full")
    before = subject.eval_logits(base, batch)
    assert_differs(case.id, "adapter", want, before, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            again = subject.impl.load(base, tmp_path)
        except subject.declines(ValueError, RuntimeError, KeyError):
            return
    if any("missing" in str(w.message).lower() for w in caught):
        return
    got = subject.eval_logits(again, batch)
    assert_close(case.id, "logits", got, want, tolerance("logits/reloaded"), measured)


def nest_keys(path: Path) -> int:
    """Rewrite an adapter's keys as the multimodal class writes them; how many were changed."""
    from safetensors.torch import load_file, save_file

    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    nested = {
        name.replace("model.model.layers.", "model.model.language_model.layers."): tensor
        for name, tensor in tensors.items()
    }
    save_file(nested, file, metadata={"format": "pt"})
    config = json.loads((path / "adapter_config.json").read_text())
    if isinstance(config.get("target_modules"), str):
        config["target_modules"] = config["target_modules"].replace("model.layers", "layers")
        (path / "adapter_config.json").write_text(json.dumps(config))
    return len(set(nested) - set(tensors))


@check("C10", needs=("prepare", "merge", "save", "load"), settings=LORA)
def test_merged_export(case: Case, subject: Subject, measured: Measured, tmp_path: Path) -> None:
    """A merged model that was exported and loaded equals the merged model in memory.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3771
    """
    model = subject.model()
    batch = subject.batch()
    result: Any = subject.impl.merge(model)
    want = subject.eval_logits(result, batch)
    base = subject.model(tuning="full")
    assert_differs(case.id, "adapter", want, subject.eval_logits(base, batch), {})
    subject.impl.save(result, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists(), f"{case.id}: an adapter was exported"
    again = subject.impl.load(subject.model(tuning="full"), tmp_path)
    assert_equal(case.id, "logits", subject.eval_logits(again, batch), want, measured)


@check("C07", needs=("fit", "resume"), dealt=("lora",))
def test_resume_is_exact(case: Case, subject: Subject, measured: Measured, tmp_path: Path) -> None:
    """N + M steps equal N, save, resume, M: parameters bit for bit, data order and schedule too.

    https://github.com/huggingface/transformers/issues/48805
    """
    samples = subject.samples("text", count=6)
    options: dict[str, Any] = {"batch_size": 1, "lr": 1e-2, "schedule": "linear"}
    straight = subject.model()  # it saves on its way: had that changed it, the other would differ
    plan = subject.plan()
    start = {n: p.detach().clone() for n, p in straight.named_parameters()}
    subject.impl.fit(
        straight, samples, plan, steps=4, save_steps=2, output_dir=tmp_path / "a", **options
    )
    second = subject.model()
    subject.impl.resume(
        second,
        samples,
        plan,
        steps=4,
        resume=str(tmp_path / "a" / "checkpoint-2"),
        output_dir=tmp_path / "b",
        **options,
    )
    want, got = dict(straight.named_parameters()), dict(second.named_parameters())
    moved = [n for n, p in want.items() if p.requires_grad and not torch.equal(p, start[n])]
    assert moved, f"{case.id}: training moved nothing"
    for name in moved:
        assert_equal(case.id, name, got[name], want[name], measured)
