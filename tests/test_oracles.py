"""The oracles against hand-computed cases and, as a finding, against the installed modules."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.oracles import (
    adapters,
    attention,
    auxiliary_loss,
    masks,
    routing,
)
from conformance.oracles import experts as expert_oracle

MOE = {
    "mixtral": ("Mixtral", "TopKRouter", "SparseMoeBlock", "Experts"),
    "qwen2_moe": ("Qwen2Moe", "TopKRouter", "SparseMoeBlock", "Experts"),
    "qwen3_moe": ("Qwen3Moe", "TopKRouter", "SparseMoeBlock", "Experts"),
    "qwen3_next": ("Qwen3Next", "TopKRouter", "SparseMoeBlock", "Experts"),
    "qwen3_5_moe": ("Qwen3_5Moe", "TopKRouter", "SparseMoeBlock", "Experts"),
    "gemma4": ("Gemma4", "TextRouter", "", "TextExperts"),
}
SIZES = {
    "hidden_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 10,
    "moe_intermediate_size": 10,
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "top_k_experts": 3,
    "enable_moe_block": True,
}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moe_part(family: str, part: int, **changes: Any) -> tuple[Any, torch.nn.Module]:
    """The config and one freshly filled float64 module of an installed MoE family."""
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    prefix = MOE[family][0]
    infix = "Text" if family in ("gemma4", "qwen3_5_moe") else ""
    config_module = import_module(f"transformers.models.{family}.configuration_{family}")
    config_class = getattr(config_module, f"{prefix}{infix}Config")
    accepted = config_class().to_dict()
    taken = {k: v for k, v in {**SIZES, **changes}.items() if k in accepted or k in changes}
    config = config_class(**taken, num_hidden_layers=2)
    config._experts_implementation = "eager"
    made = getattr(module, prefix + MOE[family][part])(config).double()
    for index, parameter in enumerate(made.parameters()):
        parameter.data.copy_(0.5 * rand(*parameter.shape, seed=index + 1))
    return config, made


ROUTERS = [(family, {}) for family in ("mixtral", "qwen3_5_moe", "gemma4")] + [
    (family, {"norm_topk_prob": normalise})
    for family in ("qwen2_moe", "qwen3_moe", "qwen3_next")
    for normalise in (False, True)
]


@pytest.mark.parametrize(("family", "changes"), ROUTERS)
@torch.no_grad()
def test_routing_equals_the_installed_router(family: str, changes: dict[str, bool]) -> None:
    config, router = moe_part(family, 1, **changes)
    hidden = rand(9, 12, seed=99)
    rule = routing.rule_of(config)
    if family == "gemma4":
        logits = routing.gemma4_logits(
            hidden, router.proj.weight, router.scale, config.rms_norm_eps
        )
        want = routing.scale_per_expert(routing.route(logits, rule), router.per_expert_scale)
        assert not torch.allclose(want.weights.sum(-1), torch.ones(9).double())
    else:
        want = routing.route(routing.linear_logits(hidden, router.weight), rule)
        assert torch.allclose(want.weights.sum(-1), torch.ones(9).double()) == rule.normalise
    _, weights, indices = router(hidden)
    assert indices.tolist() == want.indices.tolist()
    assert float((weights.double() - want.weights).abs().max()) < 1e-6


def test_routing_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64))
    found = routing.route(logits, routing.Rule(top_k=2))
    assert found.indices.tolist() == [[0, 2], [2, 0]]  # a tie goes to the lower index
    assert torch.allclose(found.weights[0], torch.tensor([0.625, 0.375]).double())
    raw = routing.route(logits, routing.Rule(top_k=2, normalise=False))
    assert torch.allclose(raw.weights[0], torch.tensor([0.5, 0.3]).double())


def test_sigmoid_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    rule = routing.Rule(top_k=2, score="sigmoid", bias=True, scale=2.5)
    found = routing.route(logits, rule, bias)
    assert found.indices.tolist() == [[3, 0]]
    low, high = 1 / (1 + math.exp(1)), 1 / (1 + math.exp(-2))
    want = torch.tensor([[low, high]]).double() / (low + high) * 2.5
    assert torch.allclose(found.weights, want)
    with pytest.raises(ValueError, match="bias"):
        routing.route(logits, rule)


def test_groups_shut_out_the_best_expert_of_a_weak_group() -> None:
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]], dtype=torch.float64)
    pair = routing.Rule(top_k=1, groups=2, groups_kept=1, score="sigmoid", normalise=False)
    assert routing.route(logits, pair).indices.tolist() == [[2]]
    single = routing.Rule(top_k=1, groups=2, groups_kept=1, group_top=1, normalise=False)
    assert routing.route(logits, single).indices.tolist() == [[0]]


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@torch.no_grad()
def test_grouped_sigmoid_equals_the_installed_router(family: str) -> None:
    facts = {
        "num_experts_per_tok": 2,
        "n_group": 3,
        "topk_group": 2,
        "n_routed_experts": 6,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "hidden_size": 12,
    }
    prefix = {"deepseek_v3": "DeepseekV3", "glm4_moe": "Glm4Moe"}[family]
    config = getattr(import_module("transformers"), f"{prefix}Config")(**facts)
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    router = getattr(module, f"{prefix}TopkRouter")(config).double()
    router.weight.data.copy_(rand(6, 12, seed=1))
    router.e_score_correction_bias.copy_(rand(6, seed=2))
    hidden = rand(9, 12, seed=3)
    want = routing.route(
        routing.linear_logits(hidden, router.weight),
        routing.rule_of(config),
        router.e_score_correction_bias.double(),
    )
    found = router(hidden)
    if torch.is_tensor(found):
        weights, indices = routed_by_block(module, prefix, config, router, found)
    else:
        _, weights, indices = found
    by_expert = torch.zeros(9, 6).double().scatter(1, indices, weights.double())
    expected = torch.zeros(9, 6).double().scatter(1, want.indices, want.weights)
    assert float((by_expert - expected).abs().max()) < 1e-6


def routed_by_block(
    module: Any, prefix: str, config: Any, router: Any, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Older layouts choose in the block, from the gate's logits."""
    block = getattr(module, f"{prefix}MoE")
    holder = SimpleNamespace(
        gate=router,
        n_routed_experts=config.n_routed_experts,
        n_group=config.n_group,
        topk_group=config.topk_group,
        top_k=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    indices, weights = block.route_tokens_to_experts(holder, logits)
    return weights, indices


@pytest.mark.parametrize("family", MOE)
def test_experts_equal_the_installed_experts(family: str) -> None:
    _, module = moe_part(family, 3)
    hidden, weights = rand(7, 12, seed=50), rand(7, 2, seed=51)
    indices = torch.tensor([[0, 1], [1, 5], [5, 0], [3, 1], [0, 5], [1, 3], [5, 3]])  # 2, 4: empty
    act = "gelu_pytorch_tanh" if family == "gemma4" else "silu"
    want = expert_oracle.experts(
        hidden,
        indices,
        weights,
        module.gate_up_proj,
        module.down_proj,
        expert_oracle.ACTIVATIONS[act],
    )
    assert torch.allclose(module(hidden, indices, weights), want, rtol=0, atol=1e-12)


def test_expert_lora_equals_the_merged_weights() -> None:
    count, rank, hidden, width = 3, 2, 5, 4
    gate_up, down = rand(count, 2 * width, hidden, seed=1), rand(count, hidden, width, seed=2)
    one = expert_oracle.Lora(rand(rank * count, hidden, seed=3), rand(2 * width, rank * count), 0.7)
    two = expert_oracle.Lora(rand(rank * count, width, seed=5), rand(hidden, rank * count), 1.3)
    x, weights = rand(4, hidden, seed=7), rand(4, 2, seed=8)
    indices = torch.tensor([[0, 1], [2, 2], [1, 3], [3, 3]])  # 3 is the sentinel
    arguments = (x, indices, weights)
    act = expert_oracle.silu
    found = expert_oracle.experts(*arguments, gate_up, down, act, one, two)
    folded = expert_oracle.experts(
        *arguments,
        adapters.merged(gate_up, one.a, one.b, one.scaling),
        adapters.merged(down, two.a, two.b, two.scaling),
        act,
    )
    assert torch.allclose(found, folded, atol=1e-12)
    assert not found[3].any() and found[2].any()
    plain = expert_oracle.experts(*arguments, gate_up, down, act)
    assert float((found - plain).abs().max()) > 0.1
    with pytest.raises(IndexError, match="outside"):
        expert_oracle.experts(x, indices + 1, weights, gate_up, down, act)


def test_delta_of_an_expert_is_b_times_a() -> None:
    a, b = rand(6, 5, seed=1), rand(4, 6, seed=2)
    delta = adapters.expert_delta(a, b, 3, 0.5)
    assert delta.shape == (3, 4, 5)
    want = 0.5 * b[:, [1, 4]] @ a[2:4]  # expert 1 of 3, rank 2
    assert torch.allclose(delta[1], want)
    assert adapters.scaling(8, 4) == 2 and adapters.scaling(8, 4, rslora=True) == 4


def test_experts_gradcheck() -> None:
    indices = torch.tensor([[0, 2], [2, 2]])
    inputs = [rand(2, 3), rand(2, 2), rand(3, 4, 3), rand(3, 3, 2), rand(6, 3), rand(4, 6)]

    def loss(x: Any, w: Any, up: Any, down: Any, a: Any, b: Any) -> Any:
        lora = expert_oracle.Lora(a, b, 0.5)
        return expert_oracle.experts(x, indices, w, up, down, expert_oracle.gelu_tanh, lora)

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


def test_auxiliary_loss_equals_the_installed_one_and_is_top_k_when_balanced() -> None:
    installed = import_module("transformers.models.mixtral.modeling_mixtral")
    layers = tuple(rand(8, 6, seed=s) for s in (1, 2))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    for valid in (None, mask):
        want = auxiliary_loss.balance_loss(
            layers, 2, None if valid is None else valid.flatten().tolist()
        )
        found = installed.load_balancing_loss_func(layers, 6, 2, valid)
        assert abs(float(found) - float(want)) < 1e-6
    one = torch.eye(6).double()
    cycle = torch.stack([one[i] + one[(i + 1) % 6] for i in range(6)])
    assert float(auxiliary_loss.balance_loss([cycle], 2)) == pytest.approx(2)


TINY_MASK = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
def test_masks_equal_the_installed_masks(window: int | None, kind: str) -> None:
    from transformers import Gemma3TextConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = Gemma3TextConfig(**TINY_MASK, sliding_window=3, num_hidden_layers=2)
    config._attn_implementation = "eager"
    padding = {"left": [[0, 0, 1, 1, 1, 1, 1, 1]], "right": [[1, 1, 1, 1, 1, 1, 0, 0]]}.get(kind)
    positions = [[0, 1, 2, 0, 1, 2, 3, 4]] if kind == "packed" else None
    build = create_causal_mask if window is None else create_sliding_window_causal_mask
    found = build(
        config=config,
        inputs_embeds=torch.zeros(1, 8, 8),
        attention_mask=torch.tensor(padding) if padding else None,
        past_key_values=None,
        position_ids=torch.tensor(positions) if positions else None,
    )
    want = masks.allowed(
        8,
        window=window,
        valid=padding,
        documents=masks.documents_of(positions) if positions else None,
    )
    rows = torch.tensor(padding[0]).bool() if padding else torch.ones(8).bool()
    assert torch.equal((found[:, 0] == 0)[:, rows], want[:, rows])


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_image_masks_equal_the_installed_masks(family: str) -> None:
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    transformers = import_module("transformers")
    config = getattr(transformers, f"G{family[1:]}TextConfig")(
        **TINY_MASK, sliding_window=3, num_hidden_layers=2, vocab_size=8
    )
    config._attn_implementation = "eager"
    types = [[0, 1, 1, 1, 1, 0, 0, 1, 1, 0]]
    build = getattr(
        module, "create_masks_for_vision_model", getattr(module, "create_causal_mask_mapping", None)
    )
    found = build(
        config=config,
        inputs_embeds=torch.zeros(1, 10, 8),
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        block_sequence_ids=module.get_block_sequence_ids_for_mask(
            torch.tensor(types), device=torch.device("cpu")
        ),
    )
    layers = masks.bidirectional_layer_types(family, "vision")
    for layer, window in (("full_attention", None), ("sliding_attention", 3)):
        blocks = masks.image_blocks(types) if layer in layers else None
        want = masks.allowed(10, window=window, blocks=blocks)
        assert torch.equal(found[layer][:, 0] == 0, want), layer
    ahead = masks.allowed(10, window=3, blocks=masks.image_blocks(types))[0]
    assert ahead[1, 4] and not ahead[4, 1] and not ahead[1, 7]  # bidirectional, inside the window


def test_masks_by_hand() -> None:
    assert masks.documents_of([[0, 1, 0, 1, 2, 0]]) == [[0, 0, 1, 1, 1, 2]]
    assert masks.image_blocks([[0, 1, 1, 0, 2, 1]]) == [[-1, 0, 0, -1, 1, 1]]
    table = masks.allowed(4, window=2, valid=[[0, 1, 1, 1]])[0]
    assert table.int().tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_attention_equals_sdpa_and_handles_empty_rows() -> None:
    q, k, v = rand(2, 4, 5, 3, seed=1), rand(2, 2, 5, 3, seed=2), rand(2, 2, 5, 3, seed=3)
    table = masks.allowed(5, batch=2, window=3)
    found = attention.attention(q, k, v, table, scale=0.5)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=table[:, None], scale=0.5, enable_gqa=True
    )
    assert torch.allclose(found, want, atol=1e-12)
    table[0, 2] = False
    assert not attention.attention(q, k, v, table, scale=0.5)[0, :, 2].any()
    capped = attention.attention(100 * q, k, v, table, scale=1.0, softcap=2.0)
    assert torch.isfinite(capped).all()
