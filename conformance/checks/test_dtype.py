"""Dtypes: what is loaded, what stays in float32, what survives a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import checkpoint
from conformance.case import Case
from conformance.check import check
from conformance.numerics import assert_close
from conformance.subject import Subject
from conformance.tolerances import tolerance

Measured = dict[str, float]


@check("D01", needs=("plan", "build"), settings=("-", "bf16"))
def test_load_dtype_is_the_asked_one(case: Case, subject: Subject) -> None:
    """The weights are loaded in the dtype that the setting asks for, whatever the file holds.

    https://github.com/huggingface/trl/issues/3910
    """
    other = "bfloat16" if case.setting.dtype == "float32" else "float32"
    path = checkpoint.checkpoint(subject.model_spec, other)
    model = subject.impl.build(path, subject.plan())
    wanted = getattr(torch, case.setting.dtype)
    wrong = {n: p.dtype for n, p in model.named_parameters() if p.dtype != wanted}
    assert not wrong, f"{case.id}: {len(wrong)} parameters are not {wanted}: {next(iter(wrong))}"


@check("D02", needs=("prepare", "loss", "save"), settings=("bf16",), dealt=("bf16+lora",))
def test_dtypes_are_stable(case: Case, subject: Subject, tmp_path: Path) -> None:
    """A step, autocast and saving leave the dtype of every parameter and buffer as it was.

    https://github.com/huggingface/trl/issues/4770
    """
    model = subject.model()
    before = {n: t.dtype for n, t in [*model.named_parameters(), *model.named_buffers()]}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    batch = subject.batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = subject.loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    subject.impl.save(model, tmp_path)
    after = {n: t.dtype for n, t in [*model.named_parameters(), *model.named_buffers()]}
    assert any(p.grad is not None for p in model.parameters()), f"{case.id}: nothing was trained"
    changed = {n: (before.get(n), d) for n, d in after.items() if before.get(n) != d}
    assert not changed, f"{case.id}: {len(changed)} changed dtype, such as {next(iter(changed))}"


@check("D05", needs=("prepare",), settings=("bf16",))
def test_rope_frequencies_stay_float32(case: Case, subject: Subject, measured: Measured) -> None:
    """Rotary frequencies of a bfloat16 model are those of the float32 model, to float32 precision.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3791
    """
    model = subject.model()
    got = {n: b for n, b in model.named_buffers() if n.endswith("inv_freq")}
    want = {n: b for n, b in subject.stock("float32").named_buffers() if n.endswith("inv_freq")}
    assert want, f"{case.id}: the model has no rotary frequencies"
    for name, frequencies in want.items():
        mine = next(b for n, b in got.items() if n.endswith(name))
        limit = tolerance("rotary/frequencies")
        assert_close(case.id, name, mine.float(), frequencies.float(), limit, measured)


@check("D06", needs=("prepare",), settings=("bf16",), traits=("moe",))
def test_router_softmax_is_float32(case: Case, subject: Subject, measured: Measured) -> None:
    """In bfloat16 the routing weights come from a float32 softmax over the router's logits.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3791
    """
    seen: list[torch.dtype] = []
    real = torch.nn.functional.softmax

    def spy(input: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        result = real(input, *args, **options)
        if input.shape[-1] == experts:
            seen.append(result.dtype)
        return result

    config = checkpoint.build_config(subject.model_spec).get_text_config()
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    model = subject.model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", spy)
        patch.setattr(torch, "softmax", spy)
        subject.eval_logits(model, subject.batch())
    measured["softmaxes"] = len(seen)
    assert seen, f"{case.id}: no softmax over the experts was seen"
    assert set(seen) == {torch.float32}, f"{case.id}: the router's softmax is in {set(seen)}"


@check("D04", needs=("prepare",), traits=("vision",), settings=("images",), marks=("vision",))
def test_float16_tower_stays_finite(case: Case, subject: Subject, measured: Measured) -> None:
    """In float16, large activations of the vision tower give finite logits.

    https://github.com/huggingface/transformers/issues/46277
    """
    model: Any = subject.model().half().eval()
    batch = subject.to(subject.batch(), "float32")
    batch = {k: v.half() if v.is_floating_point() else v for k, v in batch.items()}
    tower = getattr(model.model, "vision_tower", None) or getattr(model.model, "visual", None)
    if tower is not None:
        last = [m for m in tower.modules() if type(m).__name__.endswith(("EncoderLayer", "Block"))]
        amax = _amax(tower)
        last[-1].register_forward_hook(lambda _m, _a, out: _scaled(out, amax))
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = model(**inputs, use_cache=False).logits
    bad = int((~torch.isfinite(logits)).sum())
    measured["not finite"] = bad
    assert not bad, f"{case.id}: {bad} logits are not finite"


def _amax(tower: Any) -> float:
    """The largest activation to put into the tower's end: 2300 was seen.

    A tower that standardizes what it pooled may have more than float16 holds before: 2300 times
    the root of a width of 1152. A tiny width needs more for that, and a scale that takes it back.
    """
    for name, buffer in tower.named_buffers():
        if name.endswith("std_scale"):
            buffer.fill_(1e-4)
            return 2 * float(torch.finfo(torch.float16).max) / float(buffer.numel() ** 0.5)
    return 2300.0


def _scaled(output: Any, amax: float) -> Any:
    """A layer's output (a tensor, or a tuple led by one) scaled to the largest value `amax`."""
    tensor = output[0] if isinstance(output, tuple) else output
    scaled = tensor * (amax / tensor.abs().max())
    return (scaled, *output[1:]) if isinstance(output, tuple) else scaled
