"""Save, load and merge: every key finds its place, or the error names the first that does not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_history import in_todays_layout
from .adapter_layout import from_disk, mend_file
from .adapters import make_whole, parameter_targets
from .errors import Refused
from .model_facts import is_adapted, text_config, unwrap, without_parallel
from .patches.literal_lora_targets import take_literally
from .quantize import dequantize, is_quantized

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")
# How the text class and the multimodal class name the same decoder.
_MOVES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("as written", lambda key: key),
    ("into the multimodal class", lambda key: re.sub(r"^model\.", "model.language_model.", key)),
    ("into the text class", lambda key: re.sub(r"^model\.language_model\.", "model.", key)),
)


def save(model: nn.Module, path: Path | str) -> None:
    """Write the adapter if there is one, else the model; safetensors, whatever wraps the model."""
    inner = without_parallel(model)
    if is_adapted(model):
        # "auto" would ask the hub whether the vocabulary grew
        inner.save_pretrained(str(path), save_embedding_layers=False)
        mend_file(inner, Path(path))
    elif is_quantized(inner):
        raise Refused(
            "the model's weights are packed in 4 bits; save its adapter, or merge it first"
        )
    else:
        inner.save_pretrained(str(path))


def load(model: nn.Module, path: Path | str) -> nn.Module:
    """What `save` wrote, loaded into a base model (or into the same adapters again).

    An adapter moves between the text class and the multimodal class of a family. Raises Refused,
    naming the first key, when anything is missing, unexpected, of another shape, or did not arrive.
    """
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).exists():
        return _load_adapter(model, folder)
    if is_adapted(model):
        raise Refused(f"{folder} holds a whole model; load it into a model without adapters")
    load_weights(model, folder)
    return model


def merge(model: nn.Module) -> nn.Module:
    """The model with its adapters folded into the weights; a trained copy of a tied head is kept.

    Quantised base weights are dequantised first: folding into four bits would lose the adapter.
    """
    if not is_adapted(model):
        return model
    adapted = without_parallel(model)
    if is_quantized(adapted):
        dequantize(adapted)
    trained = _trained_copies(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    for name, weights in trained.items():
        _keep_trained(merged, name, weights)
    assert isinstance(merged, nn.Module)
    return merged


def _trained_copies(adapted: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Weights of `modules_to_save` by the name of the module in the base model."""
    copies: dict[str, dict[str, Tensor]] = {}
    for name, module in adapted.named_modules():
        saved, active = getattr(module, "modules_to_save", None), "default"
        if isinstance(saved, nn.ModuleDict) and active in saved:
            weights = {k: p.detach().clone() for k, p in saved[active].named_parameters()}
            copies[name.removeprefix(_PREFIX)] = weights
    return copies


def _keep_trained(merged: Any, name: str, weights: Mapping[str, Tensor]) -> None:
    """Put trained weights back if merging lost them, and untie what is no longer equal (peft#2777).

    Saving a model whose config ties the head would drop it, and loading would tie it again.
    """
    module = merged.get_submodule(name)
    for key, value in weights.items():
        if not torch.equal(getattr(module, key), value):
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        for config in (merged.config, text_config(merged)):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False


def load_weights(model: nn.Module, folder: Path) -> None:
    """A whole model's weights, read as `from_pretrained` reads them, into this one.

    A Trainer checkpoint is written through the key conversions of its class, so it must be read
    through them too (transformers#48805); the state dict alone would miss every fused expert.
    """
    from .build import load_loudly

    target = unwrap(model)
    floating = [p.dtype for p in target.parameters() if p.is_floating_point()]
    widest = reduce(torch.promote_types, floating, torch.float16)
    if all(dtype == floating[0] for dtype in floating):
        widest = floating[0]
    fresh = load_loudly(type(target), folder, {"dtype": widest})
    target.load_state_dict(fresh.state_dict(), strict=True)


def _load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    tensors = _read(folder)
    config: Any = LoraConfig.from_pretrained(str(folder))
    base = unwrap(model)
    move = _move(base, tensors, folder)
    tensors = {_PREFIX + move(key): value for key, value in tensors.items()}
    adapted: Any = without_parallel(model)
    if not is_adapted(model):
        config.inference_mode = False
        config.target_modules = _targets(base, config, tensors)
        short = {".".join(t.split(".")[-2:]) for t in config.target_parameters or ()}
        config.target_parameters = parameter_targets(base, sorted(short)) or None
        wide = all(t.dtype == torch.float32 for t in tensors.values())
        literal = take_literally()
        try:
            adapted = get_peft_model(base, config, autocast_adapter_dtype=wide)
        except ValueError as error:
            raise Refused(f"{folder}: {error}") from error
        finally:
            literal()
        make_whole(adapted)
    tensors = in_todays_layout(adapted, from_disk(adapted, tensors), _written_by(folder))
    put_adapter(adapted, tensors, folder)
    assert isinstance(adapted, nn.Module)
    return adapted


def _written_by(folder: Path) -> Any:
    """The release of PEFT that wrote an adapter; older ones did not say."""
    return json.loads((folder / ADAPTER_CONFIG).read_text()).get("peft_version")


def put_adapter(adapted: Any, tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Set adapter weights by their saved keys; Refused unless all of them arrived, unchanged."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(adapted, dict(tensors))
    except (KeyError, RuntimeError) as error:
        raise Refused(f"{where}: {str(error).splitlines()[-1].strip()}") from error
    unexpected = sorted(result.unexpected_keys or ())
    if unexpected:
        raise Refused(f"{where}: unexpected adapter key {unexpected[0]} ({len(unexpected)} in all)")
    now = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    apart = sorted(set(now) ^ set(tensors))
    if apart:
        side = "missing from the file" if apart[0] in now else "without a place in the model"
        raise Refused(f"{where}: adapter key {apart[0]} is {side} ({len(apart)} in all)")
    for key, value in tensors.items():
        if not torch.equal(now[key].detach().cpu(), value.to(now[key].dtype).cpu()):
            raise Refused(f"{where}: adapter key {key} did not arrive in the model")


def _read(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by their names in the base model's class (prefix removed)."""
    from safetensors.torch import load_file

    file = folder / ADAPTER_FILE
    if not file.exists():
        raise Refused(f"{folder} has {ADAPTER_CONFIG} but no {ADAPTER_FILE}")
    try:
        kind = json.loads((folder / ADAPTER_CONFIG).read_text()).get("peft_type")
        tensors = load_file(file)
    except Exception as error:
        raise Refused(f"{folder}: the adapter cannot be read: {error}") from error
    if kind != "LORA":
        raise Refused(f"{folder}: peft_type is {kind}; only LORA is known here")
    if not tensors:
        raise Refused(f"{file} holds no tensor")
    return {key.removeprefix(_PREFIX): value for key, value in tensors.items()}


def module_of(key: str) -> str:
    """The module a saved adapter key belongs to, nesting of parameter adapters removed."""
    found = _FACTOR.search(key)
    owner = key[: found.start()] if found else key.rpartition(".")[0]
    return owner.replace(".base_layer", "")


def _move(base: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> Callable[[str], str]:
    """The first renaming under which every adapted module is there; Refused if there is none."""
    present = {name for name, _ in base.named_modules()}
    lacking = ""
    for _, move in _MOVES:
        missing = [key for key in tensors if module_of(move(key)) not in present]
        if not missing:
            return move
        lacking = lacking or module_of(missing[0])
    raise Refused(
        f"{folder}: the adapter is for another model: {type(base).__name__} has no {lacking}"
    )


def _targets(base: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The config's own targets if they select exactly the saved modules, else those, by name."""
    found = {module_of(key.removeprefix(_PREFIX)) for key in tensors if _FACTOR.search(key)}
    owners = {t.rpartition(".")[0] for t in config.target_parameters or ()}
    by_parameter = {
        name for name in found for owner in owners if name == owner or name.endswith(f".{owner}")
    }
    by_module = found - by_parameter
    written = config.target_modules
    names = [name for name, _ in base.named_modules()]
    if isinstance(written, str):
        selected = {name for name in names if re.fullmatch(written, name)}
    else:
        suffixes = tuple(f".{t}" for t in written or ())
        selected = {n for n in names if n in (written or ()) or n.endswith(suffixes)}
    return written if selected == by_module else sorted(by_module)
