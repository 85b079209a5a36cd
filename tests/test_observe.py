"""The observer on open loops, accelerate, and HF `Trainer` as a black box."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from conformance.observe import (
    cpu_peak,
    full,
    gpu_peak,
    gradients,
    observe,
    parameters,
    storage_bytes,
)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 1)
        self.unused = nn.Linear(1, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        out = self.b(torch.tanh(self.a(x)))
        return SimpleNamespace(loss=None if labels is None else (out - labels).square().mean())


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, generator=generator), torch.randn(5, 1, generator=generator)


def test_records_steps_with_accumulation_and_clipping() -> None:
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    start = parameters(model, trainable=True)
    with observe(model) as seen:
        for step in range(2):
            for micro in range(3):
                (model(*data(3 * step + micro)).loss / 3).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            optimizer.step()
            optimizer.zero_grad()
    assert [s.backwards for s in seen.steps] == [3, 3]
    first = seen.steps[0]
    assert len(first.losses) == 3 and first.loss == pytest.approx(sum(first.losses) / 3)
    assert set(first.gradients) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    norm = torch.stack([g.norm() for g in first.gradients.values()]).norm()
    assert float(norm) == pytest.approx(1e-2, rel=1e-3)  # as the optimizer got them
    for name, gradient in first.gradients.items():
        assert torch.allclose(first.parameters[name], start[name] - 0.5 * gradient)
    assert "frozen.weight" not in first.parameters and first.learning_rate == 0.5
    assert first.cpu_peak > 2**20 and seen.last is seen.steps[1]


def test_keeps_tensors_of_one_step_and_leaves_no_hook() -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def once() -> None:
        model(*data(0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(RuntimeError, match="stop"), observe(model, optimizer_step=1) as seen:
        once()
        once()
        raise RuntimeError("stop")
    once()
    assert [bool(s.gradients) for s in seen.steps] == [False, True]
    assert not model._forward_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_other_models_and_evaluation_are_not_counted() -> None:
    model, other = Toy(), Toy()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with observe(model) as seen:
        other(*data(0)).loss.backward()
        optimizer.step()
        with torch.no_grad():
            model(*data(0))
    assert not seen.steps and not seen.losses
    with pytest.raises(LookupError, match="no optimizer step"):
        _ = seen.last


def test_accelerate_steps_once() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = Toy()
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with observe(model) as seen:
        accelerator.backward(wrapped(*data(0)).loss)
        optimizer.step()
    assert len(seen.steps) == 1 and seen.last.backwards == 1 and seen.last.gradients


def test_hf_trainer_is_judged_from_outside(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

    config = MixtralConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        sliding_window=None,
    )
    model = MixtralForCausalLM(config)
    rows = [{"input_ids": list(range(i, i + 6)), "labels": list(range(i, i + 6))} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    before = parameters(model)
    with observe(model) as seen:
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert [s.backwards for s in seen.steps] == [2, 2]
    assert [len(s.losses) for s in seen.steps] == [2, 2]
    assert [s.learning_rate for s in seen.steps] == pytest.approx([1e-2, 5e-3])
    assert set(seen.steps[0].gradients) == set(before) == set(seen.steps[0].parameters)
    after = seen.steps[1].parameters
    assert all(torch.equal(after[name], p) for name, p in parameters(model).items())
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_sizes() -> None:
    base = torch.zeros(1000)
    assert storage_bytes([base[:10], base[20:30]]) == 4000
    copied = full(base[:10].requires_grad_())
    assert storage_bytes([copied]) == 40 and not copied.requires_grad
    assert gradients(Toy()) == {} and cpu_peak() > 0
    assert gpu_peak() == 0 or torch.cuda.is_initialized()
