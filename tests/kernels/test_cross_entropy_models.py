"""The fused loss under every family: the model's own loss and gradients, without logits."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import transformers

from conformance.batches import samples, stack
from conformance.case import Model
from conformance.checkpoint import available, build_stock
from conformance.families import MODELS
from impl.kernels.cross_entropy_models import HEADS, enable

HERE = [m for m in MODELS.values() if available(m) is None and m.model_class in HEADS]


def batch_of(model: Model) -> dict[str, torch.Tensor]:
    """Two rows of text, the first third of the labels ignored."""
    batch = stack(samples(model, "text"))
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : batch["labels"].shape[1] // 3] = -100
    return batch


def step(model: Any, batch: dict[str, Any], **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Output and gradients of one step."""
    model.zero_grad()
    output = model(**batch, use_cache=False, **options)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Every gradient, against the larger of its norm and a share of the global one."""
    assert got.keys() == wanted.keys()
    floor = 1e-4 * float(torch.stack([g.norm() for g in wanted.values()]).norm())
    for name, grad in got.items():
        error = float((grad - wanted[name]).norm()) / max(float(wanted[name].norm()), floor)
        assert error < 2e-5, f"{name}: {error:.1e}"


def test_table_covers_the_families() -> None:
    """Every model class of the suite is in the table."""
    assert {m.model_class for m in MODELS.values()} <= HEADS.keys()


@pytest.mark.parametrize("described", HERE, ids=lambda m: m.name)
def test_family(described: Model) -> None:
    """Loss, auxiliary loss and gradients are the model's own; the logits are not computed."""
    batch = batch_of(described)
    items = torch.tensor(23)
    model = build_stock(described)
    options: dict[str, Any] = {"num_items_in_batch": items}
    if "output_router_logits" in inspect.signature(model.forward).parameters:
        options["output_router_logits"] = True
    own, wanted = step(model, batch, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        enabled = enable(model)
        fused, got = step(model, batch, **options)
    assert enabled.calls == 1 and not enabled.fallbacks
    assert fused.logits is None and "logits" not in fused
    assert type(fused) is type(own)
    torch.testing.assert_close(fused.loss, own.loss, rtol=1e-6, atol=1e-6)
    if getattr(own, "aux_loss", None) is not None:
        torch.testing.assert_close(fused.aux_loss, own.aux_loss)
    compare(got, wanted)
    enabled()
    assert "forward" not in model.__dict__ and not enabled.applied
    assert step(model, batch)[0].logits is not None


def tiny(name: str = "mixtral") -> tuple[Any, dict[str, torch.Tensor]]:
    """A model and its batch."""
    return build_stock(MODELS[name]), batch_of(MODELS[name])


def test_evaluation_and_generation_keep_logits() -> None:
    """Outside training, without labels: the model's own path, nothing announced."""
    model, batch = tiny()
    enabled = enable(model)
    assert model.eval()(**batch).logits is not None
    batch.pop("labels")
    assert model.train()(**batch).logits is not None
    assert enabled.calls == 0 and not enabled.fallbacks


def test_what_it_cannot_do_is_announced() -> None:
    """Partial logits, an own loss function, a tuple: the own loss, one warning each."""
    model, batch = tiny()
    enabled = enable(model)
    with pytest.warns(UserWarning, match="logits_to_keep"):
        model(**{**batch, "labels": batch["labels"][:, -4:]}, logits_to_keep=4)
    with pytest.warns(UserWarning, match="return_dict"):
        model(**batch, return_dict=False)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    with pytest.warns(UserWarning, match="own"):
        model(**batch)
    assert enabled.calls == 0 and len(enabled.fallbacks) == 3


def test_unknown_model_keeps_its_loss() -> None:
    """A class outside the table is left alone and named."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with pytest.warns(UserWarning, match="LlamaForCausalLM is not in the table"):
        enabled = enable(model)
    assert not enabled.applied and "forward" not in model.__dict__
    enabled()


def test_unexpected_logits_are_computed() -> None:
    """A subclassed forward that does more with its logits gets real ones, and its own loss."""
    model, batch = tiny("gemma4-moe")
    own, wanted = step(model, batch)
    model.config.final_logit_softcapping = None
    _, uncapped = step(model, batch)
    enabled = enable(model)
    model.config.final_logit_softcapping = 30.0
    head = type(model).forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        keep = self.lm_head.forward
        self.lm_head.forward = lambda hidden: keep(hidden) * 1.0
        try:
            return head(self, *args, **kwargs)
        finally:
            self.lm_head.forward = keep

    enabled()
    model.__dict__["forward"] = doubled.__get__(model)
    enabled = enable(model)
    with pytest.warns(UserWarning, match="own loss|softcap"):
        output, got = step(model, batch)
    assert enabled.calls == 0 and output.logits is not None
    torch.testing.assert_close(output.loss, own.loss)
    compare(got, wanted)
    assert uncapped.keys() == got.keys()
    enabled()
    assert "forward" in model.__dict__  # the wrapper that was there before


@pytest.mark.parametrize("late", [False, True])
def test_adapted_head(late: bool) -> None:
    """A LoRA on lm_head (enabled before or after) trains as in the model's own loss."""
    import peft

    model, batch = tiny("qwen3_moe")
    enabled = None if late else enable(model)
    config = peft.LoraConfig(
        r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False, lora_alpha=16
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    enabled = enabled or enable(adapted)
    _, got = step(adapted, batch)
    assert enabled.calls == 1
    enabled()
    _, wanted = step(adapted, batch)
    assert any("lm_head" in name and "lora_A" in name for name in got)
    compare(got, wanted)


@pytest.mark.parametrize("kind", ["modules_to_save", "dora", "disabled"])
def test_other_heads(kind: str) -> None:
    """A trained copy of the head and a disabled adapter are used; DoRA falls back, announced."""
    import peft

    model, batch = tiny("qwen3_moe")
    target = ["q_proj"] if kind == "modules_to_save" else ["q_proj", "lm_head"]
    config = peft.LoraConfig(
        r=2, target_modules=target, use_dora=kind == "dora", init_lora_weights=False,
        modules_to_save=["lm_head"] if kind == "modules_to_save" else None,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    if kind == "disabled":
        adapted.base_model.disable_adapter_layers()
        for parameter in adapted.parameters():
            parameter.requires_grad_(True)
    enabled = enable(adapted)
    if kind == "dora":
        with pytest.warns(UserWarning, match="DoRA"):
            _, got = step(adapted, batch)
    else:
        _, got = step(adapted, batch)
    assert enabled.calls == (0 if kind == "dora" else 1)
    enabled()
    compare(got, step(adapted, batch)[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """Under gradient checkpointing the gradients are the same."""
    model, batch = tiny()
    _, wanted = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    enabled = enable(model)
    _, got = step(model, batch)
    assert enabled.calls == 1
    compare(got, wanted)


def test_enabled_twice() -> None:
    """One clear line."""
    model, _ = tiny()
    enable(model)
    with pytest.raises(ValueError, match="already has the fused loss"):
        enable(model)
