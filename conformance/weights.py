"""Deterministic weights by canonical name and shape, not by initialisation order.

The same numbers on every version of transformers, rank, strategy, class and key layout (DESIGN,
decision 1). Everything is jittered: a norm of exactly one, a zero router or a zero LoRA B would
hide a bug. Every value is exactly representable in float32, so a float32 checkpoint read as float64
is the float64 model to the last bit.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import nn

# Components that say how a model is wrapped or nested, not which weight it is.
_NESTING = frozenset(
    {
        "model",
        "language_model",
        "vision_model",
        "module",
        "base_model",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_orig_mod",
        "parametrizations",
        "original",
        "modules_to_save",
        "original_module",
        "default",
    }
)
_ONES = ("layer_scalar", "scale", "per_expert_scale", "std_scale", "correct_output_scale")
_JITTER = 0.05
_CLIP = 8.0  # finite clip bounds: wide enough for normalised activations
_HEAD = 0.5  # logits of unit-rms states have this spread, so the loss starts near ln V
_ROUTER = 2.0  # router logits have this spread: clear choices, no dead expert


def canonical_name(name: str) -> str:
    """A parameter's name without wrapper and nesting components.

    `base_model.model.model.language_model.layers.0.mlp.up_proj.base_layer.weight` and
    `model.layers.0.mlp.up_proj.weight` both become `layers.0.mlp.up_proj.weight`.
    In an adapter's name `base_layer` stays: nested wrappers tell two expert weights apart by it.
    """
    dropped = _NESTING if "lora_" in name else _NESTING | {"base_layer"}
    return ".".join(part for part in name.split(".") if part not in dropped)


def fill(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write every parameter and persistent buffer of `model` in place, tied ones once.

    dtype: cast the parameters and persistent buffers to it; None keeps each one's own. Adapters
    are left alone (`fill_adapters`), as are integer and quantised tensors.
    Raises ValueError for a tensor on the meta device.
    """
    for name, module, tensor in _tensors(model):
        if "lora_" not in name:
            base, std = _scale(name, tuple(tensor.shape), module)
            _write(name, tensor, value(name, tuple(tensor.shape), base, std), dtype)


def fill_adapters(model: nn.Module) -> int:
    """Write every LoRA factor in place, B too (not zero), and return how many there were."""
    count = 0
    for name, _, tensor in _tensors(model):
        if "lora_" in name and tensor.dim() >= 2:
            std = (0.5 if "_B" in name else 1.0) / math.sqrt(tensor.shape[-1])
            _write(name, tensor, value(name, tuple(tensor.shape), 0.0, std), None)
            count += 1
    return count


def value(name: str, shape: tuple[int, ...], base: float, std: float) -> torch.Tensor:
    """`base + std * randn` of a canonical name and shape: float32, CPU, the same everywhere.

    Do not write to the result: small ones are kept.
    """
    make = _value if math.prod(shape) > 1 << 20 else _small_value
    return make(name, shape, base, std)


def _value(name: str, shape: tuple[int, ...], base: float, std: float) -> torch.Tensor:
    digest = hashlib.sha256(f"{name}{shape}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # float64, then rounded: the float32 kernels differ in their last bit between processors
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise.mul_(std).add_(base).float()


_small_value = lru_cache(maxsize=None)(_value)


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Canonical name, owner and tensor of each floating parameter and persistent buffer, once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = list(module.named_parameters(recurse=False))
        transient = module._non_persistent_buffers_set
        own += [(n, b) for n, b in module.named_buffers(recurse=False) if n not in transient]
        for leaf, tensor in own:
            if id(tensor) not in seen and tensor.is_floating_point():
                seen.add(id(tensor))
                yield canonical_name(f"{prefix}.{leaf}" if prefix else leaf), module, tensor


def _write(name: str, tensor: torch.Tensor, new: torch.Tensor, dtype: torch.dtype | None) -> None:
    if tensor.is_meta:
        raise ValueError(f"weights: {name} is on the meta device, nothing can be written to it")
    with torch.no_grad():
        if dtype is not None and dtype != tensor.dtype:
            tensor.data = tensor.data.to(dtype)
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is not None:
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(tensor, DTensor)
            new = distribute_tensor(new.to(tensor.device), mesh, tensor.placements)
        tensor.copy_(new)


def _scale(name: str, shape: tuple[int, ...], module: nn.Module) -> tuple[float, float]:
    """Mean and standard deviation for a tensor, from its name, shape and owner."""
    leaf = name.rpartition(".")[2]
    if (
        leaf == "A_log"
    ):  # decay of a step about exp(-0.5 * softplus(0)) = 0.7: memory, and gradients
        return math.log(0.5), 0.25
    if leaf == "dt_bias":
        return 0.0, 0.25
    if leaf.endswith(("_min", "_max")) and not shape:
        return (-_CLIP if leaf.endswith("_min") else _CLIP), _JITTER
    if len(shape) <= 1:
        return _constant(leaf, module), _JITTER
    if isinstance(module, nn.modules.conv._ConvNd):
        return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))
    if name.endswith("router.proj.weight"):  # its input is already divided by the root of its width
        return 0.0, _ROUTER
    gain = 1.0
    if name.endswith(".gate.weight"):
        gain = _ROUTER
    elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
        gain = _HEAD
    return 0.0, gain / math.sqrt(shape[-1])


def _constant(leaf: str, module: nn.Module) -> float:
    if leaf in _ONES:
        return 1.0
    if leaf == "weight":
        return _norm_base(module)
    return 0.0


_norm_bases: dict[type[nn.Module], float] = {}


def _norm_base(module: nn.Module) -> float:
    """1 where a norm multiplies by its weight, 0 where it multiplies by one plus its weight.

    Asked of the module itself, by its output under a zero weight: classes differ, and versions may.
    """
    kind = type(module)
    if kind not in _norm_bases:
        probe = copy.deepcopy(module)
        with torch.no_grad():
            for parameter in probe.parameters():
                parameter.zero_()
            ones = torch.ones_like(next(probe.parameters())).unsqueeze(0)
            ones[..., ::2] = 2.0  # not constant: a layer norm would give zero in any case
            try:
                out = probe(ones)
            except (TypeError, AttributeError):  # a gated norm takes the gate as well
                out = probe(ones, ones)
        _norm_bases[kind] = float(not out.any())
    return _norm_bases[kind]
