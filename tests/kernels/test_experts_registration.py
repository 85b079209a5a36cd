"""Registration with transformers and PEFT: fused where it can be, announced where it is not."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from impl.kernels import registration

BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
IDS = torch.arange(20).view(2, 10)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Ours is registered for the test and gone after it."""
    before = ParamWrapper.forward
    registration.register()
    registration.calls.reset()
    yield
    registration.unregister()
    assert ParamWrapper.forward is before and not registration.is_registered()


def build(implementation: str, targets: tuple[str, ...], dtype: torch.dtype = torch.float64) -> Any:
    """A two-layer Mixtral with random adapters, the same for every implementation."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model: Any = MixtralForCausalLM(config).to(dtype)
    model.set_experts_implementation(implementation)
    if targets:
        lora = LoraConfig(
            r=3, lora_alpha=5, use_rslora=True, target_modules=[], target_parameters=list(targets)
        )
        model = get_peft_model(model, lora)
        randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Adapters that change something, by name."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.manual_seed(sum(map(ord, name)))
            parameter.data = torch.randn_like(parameter) * 0.2


def step(model: Any) -> dict[str, Tensor]:
    """Loss and gradients of one batch."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:], ()], ids=len)
def test_the_whole_model_agrees_with_eager(targets: tuple[str, ...]) -> None:
    wanted, got = step(build("eager", targets)), step(build("scattermoe", targets))
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        error = float((got[name] - value).norm() / value.norm().clamp_min(1e-30))
        assert error < 1e-12, f"{name} is off by {error:.2e}"
    fused = registration.calls.fused if targets else registration.calls.base
    assert fused == 2 and registration.calls.plain == 0


def test_no_parametrization_is_ever_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("scattermoe", BOTH)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("PEFT formed W + s B A")

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", refuse)
    step(model)
    assert registration.calls.fused == 2


def test_two_active_adapters_run_the_plain_stack_and_say_so() -> None:
    model, eager = build("scattermoe", BOTH), build("eager", BOTH)
    for each in (model, eager):
        each.add_adapter("two", each.peft_config["default"])
        randomize(each)
        each.base_model.set_adapter(["default", "two"])
    with pytest.warns(registration.KernelFallbackWarning, match="2 active adapters"):
        got = model(input_ids=IDS).logits
    assert registration.calls.plain == 2 and registration.calls.fused == 0
    assert registration.calls.reasons == {"2 active adapters": 2}
    assert torch.allclose(got, eager(input_ids=IDS).logits, rtol=1e-10, atol=1e-12)
    for each in (model, eager):
        each.base_model.set_adapter("two")
    registration.calls.reset()
    got = model(input_ids=IDS).logits
    assert registration.calls.fused == 2
    assert torch.allclose(got, eager(input_ids=IDS).logits, rtol=1e-10, atol=1e-12)


def test_disabled_and_merged_adapters_run_the_base_kernel() -> None:
    model = build("scattermoe", BOTH)
    adapted = model(input_ids=IDS).logits
    registration.calls.reset()
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    assert registration.calls.base == 2 and not torch.allclose(base, adapted)
    model.merge_adapter()
    merged = model(input_ids=IDS).logits
    assert registration.calls.base == 4 and registration.calls.plain == 0
    assert torch.allclose(merged, adapted, rtol=1e-9, atol=1e-11)


def test_compile_around_it_changes_no_number() -> None:
    model = build("scattermoe", BOTH)
    wanted = model(input_ids=IDS).logits
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(input_ids=IDS).logits, wanted)


def test_a_foreign_function_of_the_name_is_refused() -> None:
    registration.unregister()
    ExpertsInterface.register(registration.NAME, test_a_foreign_function_of_the_name_is_refused)
    try:
        with pytest.raises(RuntimeError, match="already registered as"):
            registration.register()
        registration.unregister()
        assert registration.NAME in ALL_EXPERTS_FUNCTIONS, (
            "a foreign function is not ours to remove"
        )
    finally:
        del ExpertsInterface._global_mapping[registration.NAME]


class Toy(nn.Module):
    """An experts module that transformers' decorator could have made."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
    has_post_expert_norm = _is_expert_parallel = False

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = 4, act
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 24) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(4, 24, 16) * 0.2)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.as_tensor(self.act_fn(gate) * up)


def test_the_activation_is_measured_not_read() -> None:
    functional = nn.functional
    assert registration.activation_of(Toy(functional.silu)) == "silu"
    assert registration.activation_of(Toy(nn.GELU(approximate="tanh"))) == "gelu_tanh"
    for other in (nn.GELU(), functional.relu, lambda x: functional.silu(x).clamp(max=7)):
        assert registration.activation_of(Toy(other)) is None
    module = Toy(functional.silu)
    assert registration.activation_of(module) == "silu"
    module.act_fn = functional.relu
    assert registration.activation_of(module) is None, "a replaced activation is measured again"


def test_an_unknown_layout_falls_back_visibly_and_rightly() -> None:
    module = Toy(nn.GELU())
    inputs = (torch.randn(6, 24), torch.randint(0, 4, (6, 2)), torch.rand(6, 2))
    with pytest.warns(registration.KernelFallbackWarning, match="activation GELU"):
        got = registration.experts_forward(module, *inputs)
    assert torch.equal(got, ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *inputs))
    for flag, value in (("is_transposed", True), ("has_bias", True), ("is_concatenated", False)):
        odd = Toy(nn.functional.silu)
        setattr(odd, flag, value)
        assert registration.why_unsupported(odd) is not None, flag
    good = Toy(nn.functional.silu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.experts_forward(good, *inputs)
    assert registration.calls.base == 1 and registration.calls.plain == 1
