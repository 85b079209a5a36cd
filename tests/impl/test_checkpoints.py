"""Adapters and models on disk, and training through the Trainer: what is written comes back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conformance import batches, checkpoint
from conformance.weights import fill_adapters
from impl.build import build
from impl.checkpoints import load, merge, save
from impl.errors import Refused
from impl.fit import fit
from impl.patches.swap import swapped
from impl.prepare import prepare, undo
from impl.training_plan import LoraPlan
from tests.impl.plans import EXPERTS, LORA, make_plan, spec

IDS = torch.arange(3, 15)[None]
BOTH = LoraPlan(LORA.target_modules, EXPERTS.target_parameters)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    before = swapped()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA target_modules names expert")
        yield
    assert swapped() == before, "a global replacement was left behind"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(input_ids=IDS, use_cache=False).logits
    assert isinstance(out, torch.Tensor)
    return out


def adapted(name: str, lora: LoraPlan, **changes: Any) -> nn.Module:
    stock = checkpoint.build_stock(spec(name))
    model = prepare(stock, make_plan(spec(name), lora=lora, **changes))
    fill_adapters(model)
    return model


@pytest.mark.parametrize(
    ("name", "lora"),
    [("gemma4-moe", BOTH), ("mixtral", EXPERTS), ("qwen3_5_moe", BOTH), ("gemma3-vlm", LORA)],
)
def test_adapter_round_trip_and_merge(name: str, lora: LoraPlan, tmp_path: Path) -> None:
    model = adapted(name, lora)
    want = logits(model)
    save(model, tmp_path)
    base = checkpoint.build_stock(spec(name))
    assert not torch.allclose(logits(base), want, atol=1e-3)
    again = load(base, tmp_path)
    assert torch.equal(logits(again), want)
    assert {p.dtype for n, p in again.named_parameters() if "lora_" in n} == {torch.float32}
    save(again, tmp_path / "twice")
    first, second = (
        load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "twice")
    )
    assert set(first) == set(second)
    merged = merge(again)
    assert not any("lora_" in n for n, _ in merged.named_parameters())
    assert float((logits(merged) - want).abs().max()) < 3e-5
    save(merged, tmp_path / "merged")
    assert torch.equal(
        logits(load(checkpoint.build_stock(spec(name)), tmp_path / "merged")), logits(merged)
    )
    undo(model)


def test_a_clipped_tower_can_be_adapted_saved_and_loaded(tmp_path: Path) -> None:
    towers = LoraPlan(r"model\.(vision_tower|language_model)\..*\.(q_proj|v_proj)")
    model = adapted("gemma4-moe", towers)
    save(model, tmp_path)
    base = prepare(checkpoint.build_stock(spec("gemma4-moe")), make_plan())
    again = load(base, tmp_path)
    mine = {n: p for n, p in model.named_parameters() if "lora_" in n}
    theirs = {n: p for n, p in again.named_parameters() if "lora_" in n}
    assert any("vision_tower" in n for n in mine) and set(mine) == set(theirs)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    undo(again)
    undo(model)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("gemma4-text", "gemma4-dense"),
        ("gemma4-dense", "gemma4-text"),
        ("qwen3_5_moe-text", "qwen3_5_moe"),
        ("qwen3_5_moe", "qwen3_5_moe-text"),
    ],
)
def test_adapters_move_between_text_and_multimodal_class(
    source: str, target: str, tmp_path: Path
) -> None:
    lora = BOTH if "moe" in source else LORA
    model = adapted(source, lora)
    want = logits(model)
    save(model, tmp_path)
    again = load(checkpoint.build_stock(spec(target)), tmp_path)
    assert float((logits(again) - want).abs().max()) < 2e-5
    undo(model)


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = adapted("mixtral", LORA)
    save(model, tmp_path)
    undo(model)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    some = sorted(tensors)[0]
    with pytest.raises(Refused, match="another model"):
        bad = {k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}
        save_file(bad, file, {"format": "pt"})
        load(checkpoint.build_stock(spec("mixtral")), tmp_path)
    with pytest.raises(Refused, match="missing from the file"):
        save_file({k: v for k, v in tensors.items() if k != some}, file, {"format": "pt"})
        load(checkpoint.build_stock(spec("mixtral")), tmp_path)
    with pytest.raises(Refused, match="size mismatch"):
        save_file(tensors | {some: tensors[some][:1].clone()}, file, {"format": "pt"})
        load(checkpoint.build_stock(spec("mixtral")), tmp_path)
    with pytest.raises(Refused, match="cannot be read"):
        file.write_bytes(b"truncated")
        load(checkpoint.build_stock(spec("mixtral")), tmp_path)
    file.unlink()
    with pytest.raises(Refused, match="no adapter_model"):
        load(checkpoint.build_stock(spec("mixtral")), tmp_path)


@pytest.mark.parametrize("name", ["gemma4-text", "gemma3-text"])
def test_a_trained_tied_head_survives_merging_and_export(name: str, tmp_path: Path) -> None:
    lora = LoraPlan(LORA.target_modules, modules_to_save=("lm_head",))
    model: Any = adapted(name, lora)
    head = model.get_base_model().lm_head.modules_to_save["default"]
    with torch.no_grad():
        head.weight.add_(
            0.3 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(5))
        )
    want = logits(model)
    save(model, tmp_path / "adapter")
    assert torch.equal(logits(load(checkpoint.build_stock(spec(name)), tmp_path / "adapter")), want)
    merged: Any = merge(model)
    assert float((logits(merged) - want).abs().max()) < 1e-4
    save(merged, tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written.get("text_config", written)["tie_word_embeddings"] is False
    again = build(tmp_path / "merged", make_plan(attn_implementation="eager"))
    assert torch.equal(logits(again), logits(merged))
    undo(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models_round_trip_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    model = checkpoint.build_stock(spec("qwen3_5_moe"), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    save(model, tmp_path)
    again = load(checkpoint.build_stock(spec("qwen3_5_moe"), dtype=dtype), tmp_path)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    other = adapted("mixtral", LORA)
    with pytest.raises(Refused, match="whole model"):
        load(other, tmp_path)
    undo(other)


def train(model: nn.Module, name: str, **options: Any) -> list[float]:
    samples = batches.samples(spec(name), "padded", count=4)
    trainer = fit(model, samples, make_plan(spec(name)), lr=1e-2, **options)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def ready(name: str, lora: LoraPlan | None = None) -> nn.Module:
    model = prepare(checkpoint.build_stock(spec(name)), make_plan(spec(name), lora=lora))
    if lora is not None:
        fill_adapters(model)
    return model


@pytest.mark.parametrize("name", ["mixtral", "gemma4-moe", "qwen3_5"])
def test_fit_accumulates_by_tokens(name: str) -> None:
    whole, parts = ready(name), ready(name)
    one = train(whole, name, steps=1, batch_size=4)
    four = train(parts, name, steps=1, batch_size=1, accumulation=4)
    assert one[0] == pytest.approx(four[0], rel=1e-5)
    short = ready(name)
    train(short, name, steps=2, batch_size=1, accumulation=3)  # the second window has one sample
    undo(whole), undo(parts), undo(short)


@pytest.mark.parametrize("lora", [None, BOTH])
def test_resume_is_exact(lora: LoraPlan | None, tmp_path: Path) -> None:
    name, options = "qwen3_5_moe-text", {"batch_size": 1, "schedule": "linear", "steps": 4}
    straight, first, second = (ready(name, lora) for _ in range(3))
    start = {n: p.detach().clone() for n, p in straight.named_parameters()}
    losses = train(straight, name, output_dir=tmp_path / "a", **options)
    train(first, name, output_dir=tmp_path / "b", save_steps=2, **options)
    resumed = train(
        second, name, output_dir=tmp_path / "c", resume=tmp_path / "b" / "checkpoint-2", **options
    )
    assert resumed[-2:] == losses[-2:]
    want, got = dict(straight.named_parameters()), dict(second.named_parameters())
    assert any(not torch.equal(p, start[n]) for n, p in want.items())
    for parameter_name, parameter in want.items():
        assert torch.equal(parameter, got[parameter_name]), parameter_name
    for model in (straight, first, second):
        undo(model)


def test_fit_bad_requests_and_an_unlabelled_batch() -> None:
    model = ready("mixtral")
    with pytest.raises(Refused, match="must be positive"):
        train(model, "mixtral", steps=0)
    with pytest.raises(Refused, match="no checkpoint directory"):
        train(model, "mixtral", steps=1, resume="nowhere")
    samples = batches.samples(spec("mixtral"), "text", count=2)
    for sample in samples:
        sample["labels"] = torch.full_like(sample["labels"], -100)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = fit(model, samples, make_plan(), steps=1, batch_size=1, accumulation=2)
    assert trainer.state.log_history[0]["loss"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    undo(model)
