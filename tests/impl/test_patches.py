"""Each upstream defect: shown on the stock stack, gone with its patch, back after the undo."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from conformance import batches, checkpoint
from impl import patches
from impl.collate import collate
from impl.errors import Refused
from impl.patches import swap
from impl.patches.token_weighted_loss import honours_item_count
from tests.impl.plans import EXPERTS, LORA, make_plan, spec

RECURRENT = ("qwen3_5-text", "qwen3_5_moe-text", "qwen3_next")


def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(**inputs, use_cache=False).logits
    assert isinstance(out, torch.Tensor)
    return out


def apply(name: str, model: nn.Module, plan: Any) -> Any:
    patch = patches.load(name)
    assert patch.applies_to(model, plan), f"{name} does not apply to {type(model).__name__}"
    return patch.apply(model, plan)


@pytest.fixture(autouse=True)
def _nothing_global_is_left() -> Any:
    before = swap.swapped()
    yield
    assert swap.swapped() == before, "a global replacement was left behind"


def test_every_patch_says_why() -> None:
    for name in patches.NAMES:
        patch = patches.load(name)
        assert len(patch.REASON) > 20 and patch.ISSUE.startswith("https://"), name


@pytest.mark.parametrize("name", RECURRENT)
def test_delta_net_documents(name: str) -> None:
    model_spec = spec(name)
    model = checkpoint.build_stock(model_spec)
    samples = batches.samples(model_spec, "packed", count=4)
    alone = torch.cat([logits(model, input_ids=s["input_ids"][None])[0] for s in samples])
    packed = collate(samples, make_plan(model_spec, pack=True))
    packed.pop("labels")

    def error() -> float:
        return float((logits(model, **packed)[0] - alone).abs().max() / alone.abs().max())

    assert error() > 0.1, "the stock stack no longer leaks: the patch can go"
    undo = apply("delta_net_documents", model, make_plan(pack=True))
    assert error() < 2e-5
    undo()
    assert error() > 0.1


def test_delta_net_gradients_of_packed_documents_under_checkpointing() -> None:
    model_spec = spec("qwen3_5-text")
    model = checkpoint.build_stock(model_spec, dtype=torch.float64)
    samples = batches.samples(model_spec, "packed", count=4)
    packed = collate(samples, make_plan(pack=True))
    apart = collate(samples, make_plan())
    undo = apply("delta_net_documents", model, make_plan(pack=True))
    no_cache = apply("packed_rows", model, make_plan(pack=True))
    model(**apart, num_items_in_batch=10).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.zero_grad()
    model(**packed, num_items_in_batch=10).loss.backward()
    undo()
    no_cache()
    whole = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    for name, parameter in model.named_parameters():
        off = float((parameter.grad - expected[name]).norm())  # type: ignore[operator]
        # the stock rule works in float32, whatever the model's dtype
        assert off <= 2e-4 * max(float(expected[name].norm()), 1e-3 * whole), (name, off)


@pytest.mark.parametrize("name", ["mixtral", "gemma4-text", "gemma3-text", "qwen3_5-text"])
def test_packed_rows_with_a_mask(name: str) -> None:
    model_spec = spec(name)
    model = checkpoint.build_stock(model_spec)
    packed = collate(batches.samples(model_spec, "packed", count=2), make_plan(pack=True))
    packed.pop("labels")
    right = logits(model, **packed)
    ones = torch.ones_like(packed["input_ids"])

    def error() -> float:
        return float((logits(model, **packed, attention_mask=ones) - right).abs().max())

    assert error() > 0.05
    undo = apply("packed_rows", model, make_plan())
    assert error() == 0
    hole = ones.clone()
    hole[:, 4] = 0
    with pytest.raises(Refused, match="masked positions inside"):
        logits(model, **packed, attention_mask=hole)
    undo()
    assert error() > 0.05


def test_packed_rows_leaves_padding_alone() -> None:
    model_spec = spec("mixtral")
    model = checkpoint.build_stock(model_spec)
    batch = collate(batches.samples(model_spec, "padded"), make_plan())
    batch.pop("labels")
    positions = batch["attention_mask"].cumsum(-1) - 1
    before = logits(model, **batch, position_ids=positions)
    undo = apply("packed_rows", model, make_plan())
    assert torch.equal(logits(model, **batch, position_ids=positions), before)
    undo()


@pytest.mark.parametrize("name", ["mixtral", "gemma3-text", "qwen3_moe"])
def test_packed_rows_with_the_default_cache(name: str) -> None:
    model_spec = spec(name)
    model = checkpoint.build_stock(model_spec).eval()
    packed = collate(batches.samples(model_spec, "packed", count=2), make_plan(pack=True))
    packed.pop("labels")
    right = logits(model, **packed)

    def error() -> float:
        with torch.no_grad():
            return float((model(**packed).logits - right).abs().max())

    assert error() > 0.05, "packed rows no longer leak beside a cache"
    undo = apply("packed_rows", model, make_plan())
    assert error() == 0
    undo()
    assert error() > 0.05


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gemma3-vlm", "gemma4-dense", "gemma4-moe"])
def test_packed_images(name: str, attn: str) -> None:
    model = checkpoint.build_stock(spec(name), attn=attn)
    samples = batches.samples(spec(name), "images", count=3)
    packed = collate(samples, make_plan(spec(name), pack=True))
    packed.pop("labels")
    alone = []
    for sample in samples:
        one = collate([sample], make_plan(spec(name)))
        one.pop("labels")
        alone.append(logits(model, **one)[0])
    right = torch.cat(alone)

    def error() -> float:
        return float((logits(model, **packed)[0] - right).abs().max() / right.abs().max())

    assert error() > 0.05, "packed image blocks are right now: the patch can go"
    undo = apply("packed_images", model, make_plan())
    assert error() < 2e-5
    undo()
    assert error() > 0.05


@pytest.mark.parametrize("name", ["gemma3-vlm", "gemma4-dense", "gemma4-moe", "gemma4-unified"])
def test_image_type_ids(name: str) -> None:
    model_spec = spec(name)
    assert model_spec.images is not None and model_spec.images.type_ids is not None
    model = checkpoint.build_stock(model_spec)
    batch = collate(batches.samples(model_spec, "images"), make_plan(model_spec))
    batch.pop("labels")
    right = logits(model, **batch)
    without = {k: v for k, v in batch.items() if k != model_spec.images.type_ids}
    assert float((logits(model, **without) - right).norm() / right.norm()) > 0.01
    undo = apply("image_type_ids", model, make_plan())
    with pytest.raises(Refused, match=model_spec.images.type_ids):
        logits(model, **without)
    assert torch.equal(logits(model, **batch), right)
    logits(model, input_ids=batch["input_ids"] % 80)  # text alone needs none
    undo()
    logits(model, **without)


@pytest.mark.parametrize("name", ["gemma4-e2b", "qwen3_5", "mixtral"])
def test_image_type_ids_are_not_asked_for_without_a_bidirectional_mask(name: str) -> None:
    model = checkpoint.build_stock(spec(name))
    assert not patches.load("image_type_ids").applies_to(model, make_plan())


VLM = ("gemma4-moe", "gemma4-unified", "qwen3_5", "qwen3_5_moe")


@pytest.mark.parametrize("name", VLM)
def test_token_weighted_loss(name: str) -> None:
    model: Any = checkpoint.build_stock(spec(name))
    assert model.accepts_loss_kwargs is False
    undo = apply("token_weighted_loss", model, make_plan())
    assert model.accepts_loss_kwargs is True and model.training
    undo()
    assert model.accepts_loss_kwargs is False


def test_token_weighted_loss_is_not_claimed_for_a_forward_that_ignores_the_count() -> None:
    model: Any = checkpoint.build_stock(spec("gemma4-dense"))
    forward = model.forward
    model.forward = lambda num_items_in_batch=None, **kwargs: forward(**kwargs)
    assert not honours_item_count(model)
    assert not patches.load("token_weighted_loss").applies_to(model, make_plan())


def _lora(model: nn.Module, targets: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))  # type: ignore[arg-type]


def test_clippable_linear() -> None:
    targets = ["q_proj", "v_proj"]
    with pytest.raises(ValueError, match="not supported"):
        _lora(checkpoint.build_stock(spec("gemma4-moe")), targets)
    model = checkpoint.build_stock(spec("gemma4-moe"))
    undo = apply("clippable_linear", model, make_plan())
    again = apply("clippable_linear", model, make_plan())
    undo()
    adapted = _lora(model, targets)
    again()
    tower = [n for n, _ in adapted.named_parameters() if "vision_tower" in n and "lora_A" in n]
    assert tower and all(".linear.lora_A" in name for name in tower)
    wrapper = adapted.get_submodule(tower[0].split(".linear.lora_A")[0])
    assert "Clippable" in type(wrapper).__name__, "the clamping was lost"
    with pytest.raises(ValueError, match="not supported"):
        _lora(checkpoint.build_stock(spec("gemma4-moe")), targets)


def test_literal_lora_targets() -> None:
    pattern = r"model\.layers\.\d+\.mlp\.shared_expert\.(gate|up|down)_proj"

    def adapted() -> set[str]:
        try:
            model = _lora(checkpoint.build_stock(spec("qwen3_next")), pattern)
        except ValueError:
            return set()
        return {n for n, _ in model.named_parameters() if "lora_A" in n}

    assert not any("shared_expert" in name for name in adapted()), "PEFT takes it literally now"
    undo = apply(
        "literal_lora_targets", checkpoint.build_stock(spec("qwen3_next")), make_plan(lora=LORA)
    )
    names = adapted()
    assert names and all(".shared_expert." in name for name in names)
    undo()
    assert not any("shared_expert" in name for name in adapted())


class _Identity(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def _drift() -> float:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = checkpoint.build_stock(spec("mixtral"))
    for layer in model.model.layers:
        parametrize.register_parametrization(layer.mlp.experts, "gate_up_proj", _Identity())
    targets = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(len(model.model.layers))]
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    adapted: Any = get_peft_model(model, config)
    ids = torch.arange(3, 15)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, _, third = (logits(adapted, input_ids=ids) for _ in range(3))
    return float((third - first).abs().max())


def test_parametrization_leak() -> None:
    assert _drift() > 1e-3
    model = checkpoint.build_stock(spec("mixtral"))
    undo = apply("parametrization_leak", model, make_plan(lora=EXPERTS))
    assert _drift() == 0
    undo()
    assert _drift() > 1e-3


def _gradients(patched: bool) -> dict[str, bool]:
    """Whether the adapters of two parametrised parameters of one module get a gradient, by name."""
    from peft import LoraConfig, get_peft_model

    model: Any = checkpoint.build_stock(spec("mixtral"))
    targets = []
    for i, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(layer.mlp.experts, name, _Identity())
            targets.append(f"model.layers.{i}.mlp.experts.{name}")
    config = LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    adapted: Any = get_peft_model(model, config)
    undo = apply("parametrization_leak", model, make_plan(lora=EXPERTS)) if patched else None
    ids = torch.arange(3, 15)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(input_ids=ids, labels=ids).loss.backward()
    if undo is not None:
        undo()
    return {
        m.parameter_name: m.lora_B["default"].weight.grad is not None
        for m in adapted.modules()
        if hasattr(m, "parameter_name")
    }


def test_the_second_parametrised_parameter_is_adapted_too() -> None:
    assert sorted(_gradients(patched=False).values()) == [False, True]
    assert all(_gradients(patched=True).values())


def test_no_auxiliary_loss() -> None:
    model: Any = checkpoint.build_stock(spec("gemma4-moe"))
    ids = torch.arange(3, 15)[None]
    plain = model(input_ids=ids, labels=ids)
    asked = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert torch.equal(plain.loss, asked.loss) and not hasattr(asked, "aux_loss")
    with pytest.raises(Refused, match="no load-balancing loss"):
        apply("no_auxiliary_loss", model, make_plan(auxiliary_loss=True))
    dense = checkpoint.build_stock(spec("gemma4-text"))
    with pytest.raises(Refused, match="no experts"):
        apply("no_auxiliary_loss", dense, make_plan(auxiliary_loss=True))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_5_moe", "qwen2_moe"])
def test_auxiliary_loss_is_switched_on(name: str) -> None:
    model: Any = checkpoint.build_stock(spec(name))
    config = model.config.get_text_config()
    undo = apply("no_auxiliary_loss", model, make_plan(auxiliary_loss=True))
    assert config.output_router_logits is True
    undo()
    assert config.output_router_logits is False


def test_embeds_without_per_layer_inputs() -> None:
    model: Any = checkpoint.build_stock(spec("gemma3n"))
    ids = torch.arange(3, 15)[None]
    embeds = model.get_input_embeddings()(ids).detach()
    right = logits(model, input_ids=ids)

    def error() -> float:
        return float((logits(model, inputs_embeds=embeds) - right).norm() / right.norm())

    assert error() > 0.01
    undo = apply("embeds_without_per_layer_inputs", model, make_plan())
    assert error() == 0
    with pytest.raises(Refused, match="per_layer_inputs"):
        logits(model, inputs_embeds=embeds + 0.01)
    undo()
    assert error() > 0.01


def test_wrap_classes() -> None:
    model: Any = checkpoint.build_stock(spec("gemma4-moe"))
    listed = list(model._no_split_modules)
    present = {type(module).__name__ for module in model.modules()}
    assert set(listed) - present, "every listed class is there: the patch can go"
    undo = apply("wrap_classes", model, make_plan())
    assert set(model._no_split_modules) == set(listed) & present
    undo()
    assert list(model._no_split_modules) == listed


def test_expert_parallel_plan() -> None:
    model: Any = checkpoint.build_stock(spec("gemma4-moe"))
    config = model.config.get_text_config()
    dense = [key for key in config.base_model_ep_plan if ".mlp." in key]
    assert dense
    assert not patches.load("expert_parallel_plan").applies_to(model, make_plan())
    undo = apply("expert_parallel_plan", model, make_plan(strategy="fsdp2_ep"))
    assert config.base_model_ep_plan and not set(dense) & set(config.base_model_ep_plan)
    undo()
    assert set(dense) <= set(config.base_model_ep_plan)
    other = checkpoint.build_stock(spec("mixtral"))
    assert not patches.load("expert_parallel_plan").applies_to(
        other, make_plan(strategy="fsdp2_ep")
    )


def test_reentrant_shared_kv() -> None:
    model: Any = checkpoint.build_stock(spec("gemma4-e2b"))
    batch = collate(batches.samples(spec("gemma4-e2b"), "text"), make_plan())
    model(**batch).loss.backward()
    right = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(**batch).loss.backward()
    off = max(
        float((p.grad - right[n]).abs().max() / right[n].abs().max().clamp(min=1e-9))
        for n, p in model.named_parameters()
        if p.grad is not None
    )
    assert off > 0.05, "reentrant gradients are right now: the patch can go"
    with pytest.raises(Refused, match="use_reentrant"):
        apply("reentrant_shared_kv", model, make_plan(checkpointing={"use_reentrant": True}))
    fine = make_plan(checkpointing={"use_reentrant": False})
    assert not patches.load("reentrant_shared_kv").applies_to(model, fine)
