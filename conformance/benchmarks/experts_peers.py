"""Mixture-of-experts layers with LoRA by several providers, as functions of the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.paths import reference_package


@dataclass(frozen=True)
class Inputs:
    """One layer's tensors; the adapters have scaling ``scale`` and PEFT's layout."""

    hidden: Tensor  # (T, H)
    index: Tensor  # (T, K)
    weights: Tensor  # (T, K) float32
    gate_up: Tensor  # (E, 2I, H)
    down: Tensor  # (E, H, I)
    a_up: Tensor  # (r E, H)
    b_up: Tensor  # (2I, r E)
    a_down: Tensor  # (r E, I)
    b_down: Tensor  # (H, r E)
    scale: float
    act: str

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return (self.hidden, self.weights, self.a_up, self.b_up, self.a_down, self.b_down)


Layer = Callable[[Inputs], Tensor]


def activate(gate: Tensor, act: str) -> Tensor:
    """The activation by its name."""
    return F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")


def reference() -> Layer:
    """The reference implementation's kernel."""
    module = import_module(f"{reference_package()}.kernels.experts")

    def layer(x: Inputs) -> Tensor:
        lora = module.ExpertLora(x.a_up, x.b_up, x.scale, x.a_down, x.b_down, x.scale)
        out: Tensor = module.moe_lora_experts(
            x.hidden, x.index, x.weights, x.gate_up, x.down, act=x.act, lora=lora
        )
        return out

    return layer


def _grouped(a: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm
    out: Tensor = function(a, w, offs=offsets)
    return out


def split() -> Layer:
    """`grouped_mm` for the frozen product and two more for the adapter, by plain autograd."""

    def linear(a: Tensor, w: Tensor, la: Tensor, lb: Tensor, scale: float, at: Tensor) -> Tensor:
        experts = w.shape[0]
        first = la.view(experts, -1, la.shape[1]).transpose(1, 2)
        second = lb.view(lb.shape[0], -1, experts).permute(2, 1, 0).contiguous()
        small = _grouped(_grouped(a, first, at), second, at)
        return torch.add(_grouped(a, w.transpose(1, 2), at), small, alpha=scale)

    def layer(x: Inputs) -> Tensor:
        tokens, top_k = x.index.shape
        experts, order = torch.sort(x.index.reshape(-1))
        bins = x.gate_up.shape[0]
        values = experts.int() if experts.is_cuda else experts.float()
        counts = torch.histc(values, bins=bins, min=0, max=bins - 1)
        offsets = counts.cumsum(0).to(torch.int32)
        a = x.hidden[order // top_k]
        gate, up = linear(a, x.gate_up, x.a_up, x.b_up, x.scale, offsets).chunk(2, -1)
        y = linear(activate(gate, x.act) * up, x.down, x.a_down, x.b_down, x.scale, offsets)
        y = y * x.weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return y[back].view(tokens, top_k, -1).sum(1).to(x.hidden.dtype)

    return layer


class _Experts(nn.Module):
    """The attributes transformers' experts functions read."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
    has_post_expert_norm = _is_expert_parallel = False

    def __init__(self, x: Inputs, name: str) -> None:
        super().__init__()
        self.num_experts, self.act, self.name = x.gate_up.shape[0], x.act, name
        self.gate_up_proj = nn.Parameter(x.gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(x.down, requires_grad=False)
        moe = import_module("transformers.integrations.moe")
        self.function = moe.ALL_EXPERTS_FUNCTIONS[name] if name != "eager" else self.eager

    def act_fn(self, gate: Tensor) -> Tensor:
        return activate(gate, self.act)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    @staticmethod
    def eager(self: _Experts, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """A loop over the experts, as every modelling file has it."""
        out = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            h = self._apply_gate(F.linear(hidden[token], self.gate_up_proj[expert]))
            y = F.linear(h, self.down_proj[expert]) * weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        out: Tensor = self.function(self, hidden, index, weights)
        return out


class _Model(nn.Module):
    def __init__(self, experts: _Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: Tensor) -> Tensor:
        """The experts alone."""
        out: Tensor = self.experts(*inputs)
        return out


def peft(name: str) -> Layer:
    """PEFT's `target_parameters` on one of transformers' experts functions, or on eager."""
    library = import_module("peft")
    built: dict[int, Any] = {}

    def build(x: Inputs) -> Any:
        rank = x.a_up.shape[0] // x.gate_up.shape[0]
        config = library.LoraConfig(
            r=rank,
            lora_alpha=x.scale * rank,
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )
        model = library.get_peft_model(
            _Model(_Experts(x, name)), config, autocast_adapter_dtype=False
        )
        pairs = {"gate_up_proj": (x.a_up, x.b_up), "down_proj": (x.a_down, x.b_down)}
        for module in model.modules():
            if getattr(module, "parameter_name", None) in pairs:
                a, b = pairs[module.parameter_name]
                module.lora_A["default"].weight = nn.Parameter(a.detach())
                module.lora_B["default"].weight = nn.Parameter(b.detach())
        return model

    def layer(x: Inputs) -> Tensor:
        if id(x) not in built:
            built[id(x)] = build(x)
        model = built[id(x)]
        out: Tensor = model(x.hidden, x.index, x.weights)
        return out

    layer.model = built  # type: ignore[attr-defined]
    return layer


def liger() -> Layer:
    """Liger's fused mixture of experts: no adapter, and it trains the expert weights."""
    module = import_module("liger_kernel.ops.fused_moe")
    function = next(
        value
        for name, value in vars(module).items()
        if name.startswith("Liger") and isinstance(value, type)
    )

    def layer(x: Inputs) -> Tensor:
        out: Tensor = function.apply(x.hidden, x.gate_up, x.down, x.index.int(), x.weights)
        return out

    return layer


PROVIDERS: dict[str, Callable[[], Layer]] = {
    "reference": reference,
    "grouped_mm+split": split,
    "peft+grouped_mm": lambda: peft("grouped_mm"),
    "peft+eager": lambda: peft("eager"),
    "liger (no LoRA)": liger,
}
