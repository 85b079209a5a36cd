"""4-bit weights: what is packed, that it computes what it expands to, adapters, merging."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conformance import batches, checkpoint
from conformance.weights import fill_adapters
from impl.adapter_layout import _renamed, _renames
from impl.build import build
from impl.checkpoints import load, merge, save
from impl.collate import collate
from impl.errors import Refused
from impl.loss import loss
from impl.patches.swap import swapped
from impl.prepare import prepare, undo
from impl.quantize import bytes_by_dtype, dequantize, is_quantized
from impl.training_plan import LoraPlan
from tests.impl.plans import EXPERTS, LORA, make_plan, spec

bnb = pytest.importorskip("bitsandbytes")
BOTH = LoraPlan(LORA.target_modules, EXPERTS.target_parameters, quantize_4bit=True)
DENSE = LoraPlan(LORA.target_modules, quantize_4bit=True)
IDS = torch.arange(3, 15)[None]


@pytest.fixture(autouse=True)
def _clean() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = swapped()
    yield
    assert swapped() == before


def plan(name: str, **changes: Any) -> Any:
    lora = BOTH if "moe" in name or name == "mixtral" else DENSE
    given = {"lora": lora, "attn_implementation": "eager", "experts_implementation": "eager"}
    return make_plan(spec(name), **(given | changes))


def built(name: str, **changes: Any) -> nn.Module:
    return build(checkpoint.checkpoint(spec(name)), plan(name, **changes))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(input_ids=IDS, use_cache=False).logits
    assert isinstance(out, torch.Tensor)
    return out


def test_the_cpu_kernel_is_wrong_on_broken_rows_and_ours_is_not() -> None:
    from bitsandbytes import functional

    from impl.quantize import quantize

    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    stock = functional.dequantize_4bit(packed, state)
    assert float((stock - weight).norm() / weight.norm()) > 0.15, "the kernel is right now"
    model: Any = checkpoint.build_stock(spec("gemma4-text"))
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    assert before.shape[1] % 64
    quantize(model)
    after = model.model.layers[0].self_attn.q_proj.weight
    assert 0.03 < float((after - before).norm() / before.norm()) < 0.11


def test_evaluation_does_not_rewrite_packed_weights() -> None:
    model: Any = built("gemma4-text")
    first = logits(model)
    states = [m.weight.quant_state for m in model.modules() if hasattr(m, "quant_state")]
    assert states and all(s.absmax.dtype != torch.bfloat16 for s in states)
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("name", ["gemma4-moe", "mixtral", "qwen3_5_moe"])
def test_experts_and_projections_are_packed(name: str) -> None:
    model = built(name)
    stock = checkpoint.build_stock(spec(name))
    sizes = bytes_by_dtype(model)
    layers = [p for n, p in stock.named_parameters() if ".layers." in n and "tower" not in n]
    packable = sum(p.numel() for p in layers if p.dim() == 3)
    assert packable > 0 and sizes["uint8"] >= packable / 2
    assert sizes["uint8"] > 0.42 * sum(p.numel() for p in layers if p.dim() > 1)
    assert not any("tower" in n for n, m in model.named_modules() if hasattr(m, "quant_state"))


def test_an_adapter_adds_no_bytes_but_its_own() -> None:
    model = built("gemma4-text")
    before = bytes_by_dtype(model)
    ready = prepare(model, plan("gemma4-text"))
    own = sum(p.numel() * p.element_size() for p in ready.parameters() if p.requires_grad)
    after = bytes_by_dtype(ready)
    assert after["uint8"] == before["uint8"] > 0
    assert after["float32"] == before["float32"] + own
    undo(ready)


def by_meaning(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their keys on disk: PEFT nests adapters of packed experts in another order."""
    tensors: Any = dict(model.named_parameters())
    return dict(_renamed(tensors, _renames(model)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["gemma4-moe", "mixtral", "qwen3_5_moe", "gemma3-text"])
def test_forward_and_gradients_equal_the_expanded_twin(name: str) -> None:
    model: Any = prepare(built(name), plan(name))
    assert is_quantized(model)
    fill_adapters(model)
    batch = collate(batches.samples(spec(name), "text"), make_plan())
    value = loss(model, batch)
    value.backward()  # type: ignore[no-untyped-call]
    base = built(name)
    with torch.no_grad():
        dequantize(base)
    assert not is_quantized(base)
    twin: Any = prepare(base, plan(name))
    theirs = {k: p for k, p in by_meaning(twin).items() if p.requires_grad}
    mine = {k: p for k, p in by_meaning(model).items() if p.requires_grad}
    assert set(mine) == set(theirs)
    for parameter_name, parameter in mine.items():
        theirs[parameter_name].data.copy_(parameter.data)
    expected = loss(twin, batch)
    expected.backward()  # type: ignore[no-untyped-call]
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for parameter_name, parameter in mine.items():
        grad = theirs[parameter_name].grad
        assert grad is not None and parameter.grad is not None, parameter_name
        assert float((parameter.grad - grad).norm()) <= 1e-5 * float(grad.norm()) + 1e-9
    assert torch.equal(logits(model), logits(model)), "the adapters pile up"
    undo(model)
    undo(twin)


@pytest.mark.parametrize("name", ["gemma4-moe", "mixtral"])
def test_adapter_round_trip_and_merge(name: str, tmp_path: Path) -> None:
    model = prepare(built(name), plan(name))
    fill_adapters(model)
    want = logits(model)
    save(model, tmp_path)
    again = load(prepare(built(name), plan(name)), tmp_path)
    assert torch.equal(logits(again), want)
    merged = merge(again)
    assert not is_quantized(merged) and not any("lora_" in n for n, _ in merged.named_parameters())
    assert float((logits(merged) - want).abs().max()) < 1e-4
    save(merged, tmp_path / "merged")
    whole = build(tmp_path / "merged", make_plan(attn_implementation="eager"))
    assert torch.equal(logits(whole), logits(merged))
    # the same adapter on the expanded base: the nesting differs, the meaning must not
    plain: Any = built(name)
    dequantize(plain)
    assert float((logits(load(plain, tmp_path)) - want).abs().max()) < 1e-4
    undo(again)
    undo(model)
    with pytest.raises(Refused, match="packed"):
        save(built(name), tmp_path / "base")


def test_float64_is_refused() -> None:
    with pytest.raises(Refused, match="float64"):
        built("mixtral", dtype="float64")


def test_what_cannot_be_adapted_is_named() -> None:
    whole = replace(DENSE, modules_to_save=("q_proj",))
    with pytest.raises(Refused, match=r"layers\.0\.self_attn\.q_proj is held in 4 bits"):
        prepare(built("gemma4-text", lora=whole), plan("gemma4-text", lora=whole))
    model: Any = built("gemma4-text")
    odd = nn.Embedding(2, 3)
    odd.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].self_attn.q_proj = odd
    with pytest.raises(Refused, match=r"layers\.1\.self_attn\.q_proj is a quantised Embedding"):
        prepare(model, plan("gemma4-text"))
