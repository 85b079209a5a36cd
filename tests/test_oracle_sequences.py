"""Rotary positions, the delta rule and cross-entropy: hand-computed, and the installed modules."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.oracles import cross_entropy, delta_rule, rotary, vision_positions


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_rotary_by_hand() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).double().reshape(1, 1, 1, 4)
    found = rotary.rotate(x, torch.tensor([[3]]), rotary.frequencies(4, 100.0))[0, 0, 0]
    want = [math.cos(3), -2 * math.sin(0.3), math.sin(3), 2 * math.cos(0.3)]
    assert found.tolist() == pytest.approx(want)
    kept = rotary.rotate(x, torch.tensor([[3]]), rotary.frequencies(4, 100.0, partial=0.5))
    assert kept[0, 0, 0, 2:].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("family", ["gemma4", "qwen3_5", "mixtral"])
def test_rotary_equals_the_installed_one(family: str) -> None:
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    transformers = import_module("transformers")
    positions = torch.tensor([[0, 1, 2, 3, 7, 8]])
    x = rand(1, 2, 6, 16, seed=1)
    if family == "gemma4":
        config = transformers.Gemma4TextConfig(
            head_dim=16, global_head_dim=16, num_hidden_layers=6, hidden_size=32
        )
        embedding = module.Gemma4TextRotaryEmbedding(config)
        for layer, parameters in config.rope_parameters.items():
            theta, share = parameters["rope_theta"], parameters.get("partial_rotary_factor", 1.0)
            cos, sin = embedding(x, positions, layer)
            found = module.apply_rotary_pos_emb(x, cos, sin)
            kind = parameters["rope_type"]
            assert kind == ("proportional" if layer == "full_attention" else "default")
            make = rotary.frequencies if kind == "default" else rotary.proportional_frequencies
            want = rotary.rotate(x, positions, make(16, theta, partial=share))
            assert float((found - want).abs().max()) < 1e-5, layer
        return
    if family == "mixtral":
        config = transformers.MixtralConfig(head_dim=16, hidden_size=32, num_attention_heads=2)
        embedding = module.MixtralRotaryEmbedding(config)
        inverse = rotary.frequencies(16, config.rope_parameters["rope_theta"])
    else:
        config = transformers.Qwen3_5TextConfig(head_dim=16)
        embedding = module.Qwen3_5TextRotaryEmbedding(config)
        share = config.rope_parameters["partial_rotary_factor"]
        assert share == 0.25
        theta = config.rope_parameters["rope_theta"]
        inverse = rotary.frequencies(16, theta, partial=share)
    cos, sin = embedding(x, positions)
    found, _ = module.apply_rotary_pos_emb(x, x, cos, sin)
    assert float((found - rotary.rotate(x, positions, inverse)).abs().max()) < 1e-5


def test_interleaved_multimodal_rotary_equals_the_installed_one() -> None:
    module = import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    rope = {
        "rope_type": "default",
        "rope_theta": 1000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    config = import_module("transformers").Qwen3_5TextConfig(head_dim=32, rope_parameters=rope)
    embedding = module.Qwen3_5TextRotaryEmbedding(config)
    positions = torch.tensor([[[0, 1, 2, 2, 2]], [[0, 1, 2, 3, 3]], [[0, 1, 2, 2, 4]]])
    x = rand(1, 2, 5, 32, seed=2)
    cos, sin = embedding(x, positions)
    found, _ = module.apply_rotary_pos_emb(x, x, cos, sin)
    inverse = rotary.frequencies(32, 1000.0, partial=0.5)
    want = rotary.rotate_multimodal(x, positions, inverse, [3, 3, 2])
    assert float((found - want).abs().max()) < 1e-5
    text = rotary.rotate_multimodal(x, positions[:1].expand(3, 1, 5), inverse, [3, 3, 2])
    assert torch.equal(text, rotary.rotate(x, positions[0], inverse))


def test_multimodal_positions_equal_the_installed_ones() -> None:
    module = import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    types = [[0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0], [0, 2, 2, 0, 2, 2, 0, 0, 0, 0, 0, 0]]
    valid = [[1] * 12, [1] * 10 + [0] * 2]
    images, videos = [[1, 4, 6], [1, 2, 2]], [[2, 2, 4]]
    holder = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    )
    model = module.Qwen3_5Model
    holder.get_vision_position_ids = lambda *a, **k: model.get_vision_position_ids(holder, *a, **k)
    found, deltas = model.get_rope_index(
        holder,
        torch.zeros(2, 12, dtype=torch.int64),
        torch.tensor(types),
        torch.tensor(images),
        torch.tensor(videos),
        torch.tensor(valid),
    )
    want, wanted_deltas = vision_positions.multimodal_positions(
        types, images, videos, merge=2, valid=valid
    )
    assert torch.equal(found, want)
    assert deltas.flatten().tolist() == wanted_deltas


def test_multimodal_positions_by_hand() -> None:
    ids, deltas = vision_positions.multimodal_positions([[0, 1, 1, 1, 1, 0]], [[1, 4, 4]])
    assert ids[:, 0].tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    assert deltas == [-2]


def delta_inputs(length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    q, k = rand(2, length, 2, 4, seed=seed), rand(2, length, 2, 4, seed=seed + 1)
    v = rand(2, length, 4, 3, seed=seed + 2)
    decay = -rand(2, length, 4, seed=seed + 3).abs()
    return q, k, v, decay, torch.sigmoid(rand(2, length, 4, seed=seed + 4))


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_delta_rule_equals_the_installed_rules(family: str) -> None:
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    q, k, v, decay, beta = delta_inputs(70)
    want, state = delta_rule.gated_delta_rule(q, k, v, decay, beta)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        rule = getattr(module, name)
        queries, keys = q, k
        if "num_k_heads" not in rule.__code__.co_varnames:  # older: heads repeated by the caller
            queries, keys = q.repeat_interleave(2, dim=2), k.repeat_interleave(2, dim=2)
        found, last = rule(
            queries,
            keys,
            v,
            g=decay,
            beta=beta,
            initial_state=None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        assert float((found - want).abs().max()) < 1e-5, name
        assert float((last - state).abs().max()) < 1e-5, name


def test_delta_rule_by_hand_and_by_document() -> None:
    one = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    decay = torch.log(torch.tensor([[[0.5], [0.5]]], dtype=torch.float64))
    beta = torch.full((1, 2, 1), 0.25, dtype=torch.float64)
    out, state = delta_rule.gated_delta_rule(one, one, 4 * one, decay, beta, normalise=False)
    # first: 0.25·4 = 1; then 0.5 + 0.25·(4 − 0.5) = 1.375
    assert out.flatten().tolist() == pytest.approx([1.0, 1.375])
    assert float(state) == pytest.approx(1.375)
    inputs = delta_inputs(9)
    split = [x[:, 4:] for x in inputs]
    documents = [[0] * 4 + [1] * 5] * 2
    whole, _ = delta_rule.gated_delta_rule(*inputs, documents=documents)
    alone, _ = delta_rule.gated_delta_rule(*split)
    assert torch.equal(whole[:, 4:], alone)
    joined, _ = delta_rule.gated_delta_rule(*inputs)
    assert float((joined[:, 4:] - alone).abs().max()) > 1e-3


def test_causal_convolution_equals_torch_and_keeps_documents_apart() -> None:
    x, weight = rand(2, 7, 3, seed=1), rand(3, 4, seed=2)
    found = delta_rule.causal_convolution(x, weight)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    plain = torch.nn.functional.conv1d(padded, weight[:, None], groups=3).transpose(1, 2)
    assert torch.allclose(found, torch.nn.functional.silu(plain), atol=1e-12)
    documents = [[0, 0, 0, 1, 1, 1, 1]] * 2
    apart = delta_rule.causal_convolution(x, weight, documents=documents)
    assert torch.equal(apart[:, 3:], delta_rule.causal_convolution(x[:, 3:], weight))


def test_delta_rule_gradcheck() -> None:
    inputs = [x[:1, :3].detach().clone().requires_grad_() for x in delta_inputs(3)]
    assert torch.autograd.gradcheck(lambda *a: delta_rule.gated_delta_rule(*a)[0], inputs)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("items", [None, 11.0])
def test_cross_entropy_equals_torch(softcap: Any, smoothing: float, items: Any) -> None:
    logits = (4 * rand(2, 6, 7, seed=3)).requires_grad_()
    labels = torch.tensor([[1, -100, 3, 4, 5, 6], [0, 6, -100, -100, 2, 2]])
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    total = torch.nn.functional.cross_entropy(
        capped[:, :-1].reshape(-1, 7),
        labels[:, 1:].reshape(-1),
        label_smoothing=smoothing,
        reduction="sum",
    )
    loss = total / (items or int((labels[:, 1:] != -100).sum()))
    (gradient,) = torch.autograd.grad(loss, logits)
    found = cross_entropy.cross_entropy(
        logits, labels, num_items=items, label_smoothing=smoothing, softcap=softcap
    )
    assert float(found.value) == pytest.approx(float(loss), rel=1e-12)
    assert torch.allclose(found.gradient, gradient, atol=1e-14)
    assert not found.gradient[:, -1].any()


def test_linear_cross_entropy_gradients_by_formula() -> None:
    hidden, weight, bias = rand(5, 4, seed=1), rand(9, 4, seed=2), rand(9, seed=3)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    labels = torch.tensor([0, 8, -100, 3, 3])
    z = 2.0 * torch.tanh(0.7 * (hidden @ weight.T + bias) / 2.0)
    lse = torch.logsumexp(z, -1)
    valid = labels != -100
    nll = lse - z.gather(1, labels.clamp_min(0)[:, None])[:, 0] + 0.1 * lse**2
    loss = (nll * valid).sum() / 6
    want = torch.autograd.grad(loss, (hidden, weight, bias))
    found = cross_entropy.linear_cross_entropy(
        hidden, weight, labels, bias=bias, scale=0.7, softcap=2.0, num_items=6, z_loss=0.1
    )
    assert float(found.value) == pytest.approx(float(loss), rel=1e-12)
    for got, reference in zip((found.hidden, found.weight, found.bias), want, strict=True):
        assert got is not None and torch.allclose(got, reference, atol=1e-13)


def test_no_valid_token_is_zero_and_a_bad_label_is_named() -> None:
    found = cross_entropy.cross_entropy(rand(1, 3, 5), torch.full((1, 3), -100))
    assert float(found.value) == 0 and not found.gradient.any()
    with pytest.raises(IndexError, match="label 5"):
        cross_entropy.cross_entropy(rand(1, 3, 5), torch.tensor([[0, 5, 1]]))
