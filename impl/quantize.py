"""4-bit base weights (NF4, bitsandbytes): linear layers and 3-D expert weights, which stock skips.

transformers quantises modules that are `nn.Linear`, so a mixture of experts stays almost whole
(bitsandbytes#1849: a "4-bit" model of 46 GB). Here an expert weight is packed too and expanded when
it is read, by a parametrization; PEFT's parameter adapters go on top of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import Refused
from .model_facts import body, expert_modules, text_config, unwrap
from .training_plan import TrainingPlan

BLOCK = 64
KIND = "nf4"
SMALLEST_SIDE = 16
"""Linear layers with fewer inputs or outputs keep their dtype: gates, step sizes, mixing."""


class FourBit(nn.Module):
    """Expands a packed weight: uint8 (or the storage dtype) to `shape` in `dtype`.

    absmax: one float32 scale for each block of 64 values, in the order of the flat weight.
    """

    absmax: Tensor

    def __init__(self, shape: torch.Size, dtype: torch.dtype, state: Any) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("code", state.code, persistent=False)

    def forward(self, packed: Tensor) -> Tensor:
        """The weight, from its packed bytes."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(
            absmax=self.absmax,
            # flat: the CPU kernel misreads rows that are no multiple of the block
            shape=torch.Size([self.shape.numel()]),
            dtype=self.dtype,
            blocksize=BLOCK,
            code=self.code,
            quant_type=KIND,
        )
        flat: Tensor = dequantize_4bit(packed, state)
        return flat.reshape(self.shape)


def load_4bit(cls: Any, path: Path, plan: TrainingPlan, kwargs: dict[str, Any]) -> nn.Module:
    """Load a checkpoint directory and quantise its decoder; Refused without bitsandbytes."""
    from .build import load_loudly

    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # absent, or broken beside this torch
        raise Refused(f"4-bit weights need bitsandbytes: {error}") from error
    if plan.dtype == "float64":
        raise Refused("4-bit weights compute in float32 or bfloat16, not float64")
    model = load_loudly(cls, path, kwargs)
    # FSDP shards what it is given by its dtype, which must be that of the other weights
    storage = (
        getattr(torch, plan.dtype) if plan.strategy.startswith(("fsdp", "hsdp")) else torch.uint8
    )
    quantize(model, storage)
    return model


def quantize(model: nn.Module, storage: torch.dtype = torch.uint8) -> list[str]:
    """Pack the decoder layers' linear and expert weights in place; returns their names.

    storage: the dtype that the packed bytes are viewed as. Towers, embeddings, the head, routers,
    norms, recurrent parameters and small layers keep theirs. The model is marked as PEFT expects.
    """
    inner: Any = unwrap(model)
    done = []
    for name, parent, leaf, linear in list(_linears(inner)):
        if linear.in_features % BLOCK:
            # bitsandbytes' CPU kernel restarts the scales at every row: 25 to 40 % error, not 9
            _pack_parameter(linear, "weight", storage)
        else:
            setattr(parent, leaf, _packed_linear(linear, storage))
        done.append(f"{name}.weight")
    for name, module in list(expert_modules(inner)):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 3:
                _pack_parameter(module, key, storage)
                done.append(f"{name}.{key}")
    inner.is_loaded_in_4bit = True
    return done


def _linears(inner: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    layers = max(
        (m for m in body(inner).modules() if isinstance(m, nn.ModuleList)),
        key=lambda m: len(m) * (len(m) == text_config(inner).num_hidden_layers),
    )
    names = {module: name for name, module in inner.named_modules()}
    for layer in layers:
        for name, module in list(layer.named_modules()):
            if type(module) is not nn.Linear or "router" in name.split("."):
                continue
            if min(module.in_features, module.out_features) < SMALLEST_SIDE:
                continue
            parent, _, leaf = name.rpartition(".")
            yield names[module], layer.get_submodule(parent), leaf, module


def _packed_linear(linear: nn.Linear, storage: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    packed = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        quant_type=KIND,
        quant_storage=storage,
        device="meta",
    )
    packed.weight = bnb.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        blocksize=BLOCK,
        quant_type=KIND,
        quant_storage=storage,
        module=packed,
    ).to(linear.weight.device)
    packed.bias = linear.bias
    # or the first evaluation on such a CPU rewrites the scales in bfloat16, in place
    packed.support_avx512bf16_for_cpu = False
    assert isinstance(packed, nn.Module)
    return packed


def _pack_parameter(module: nn.Module, key: str, storage: torch.dtype) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = getattr(module, key).detach()
    packed, state = quantize_4bit(
        weight.reshape(-1), blocksize=BLOCK, quant_type=KIND, quant_storage=storage
    )
    delattr(module, key)
    module.register_parameter(key, nn.Parameter(packed, requires_grad=False))
    expand = FourBit(weight.shape, weight.dtype, state)
    parametrize.register_parametrization(module, key, expand, unsafe=True)


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight is packed into four bits."""
    return any(isinstance(m, FourBit) or hasattr(m, "quant_state") for m in model.modules())


def dense_weight(linear: Any) -> Tensor:
    """The expanded weight (out, in) of a packed linear layer, in its compute dtype."""
    from bitsandbytes.functional import dequantize_4bit

    state = linear.weight.quant_state or linear.quant_state
    weight: Tensor = dequantize_4bit(linear.weight.data.reshape(-1, 1), state)
    return weight.to(linear.compute_dtype or weight.dtype)


def dequantize(model: nn.Module) -> None:
    """Expand every packed weight in place; active adapters of linear layers are folded in first.

    Folding happens in the compute dtype on the expanded weight, never on the packed bytes
    (axolotl#3771). Adapters of expert parameters stay, for PEFT to merge.
    """
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for leaf, child in children:
            packed = child.get_base_layer() if hasattr(child, "get_base_layer") else child
            if not isinstance(packed, bnb.nn.Linear4bit):
                continue
            weight = dense_weight(packed)
            if child is not packed:
                for name in child.active_adapters:
                    if name in child.lora_A:
                        weight = weight + child.get_delta_weight(name).to(weight)
            setattr(parent, leaf, _dense_linear(packed, weight))
    for module in list(model.modules()):
        for key, chain in list(getattr(module, "parametrizations", {}).items()):
            if isinstance(chain[0], FourBit):
                _expand_parameter(module, key, chain)
    inner = unwrap(model)
    inner.is_loaded_in_4bit = False


def _dense_linear(packed: Any, weight: Tensor) -> nn.Linear:
    linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if packed.bias is not None:
        linear.bias = packed.bias
    return linear


def _expand_parameter(module: nn.Module, key: str, chain: Any) -> None:
    """Replace a packed parameter by its expansion."""
    weight = chain[0](chain.original).detach()
    parametrize.remove_parametrizations(module, key, leave_parametrized=False)
    delattr(module, key)
    module.register_parameter(key, nn.Parameter(weight, requires_grad=False))


def bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters, buffers and quantisation scales, by dtype."""
    found: Counter[str] = Counter()
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():  # not by module: an adapter shows its base's weight again
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors.append(state.absmax)
            state = getattr(state, "state2", None)
    for tensor in tensors:
        found[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return dict(found)
