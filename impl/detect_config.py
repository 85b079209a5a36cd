"""Read a model config (object, dict, file, folder) and the facts that its fields say."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .traits import ExpertFacts

Fields = Mapping[str, Any]

# Spellings of one fact over the model zoo; the first that is present decides.
EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
)
TOP_K_KEYS = (
    "num_experts_per_tok",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "num_experts_per_token",
    "experts_per_token",
)
WIDTH_KEYS = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
SHARED_KEYS = ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts")
LOGIT_SCALE_KEYS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
MAX_BYTES = 1 << 24  # of a config.json; the largest known have some hundred kilobytes
_WEIGHTS = (b"GGUF", b"PK\x03\x04")  # llama.cpp's file, PyTorch's archive
# Upper bounds that no model has reached; beyond them a config is a mistake (and slow to build).
LIMITS = {
    "hidden_size": 1_000_000,
    "num_hidden_layers": 2_000,
    "vocab_size": 100_000_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
}
SIZE_ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "vocab_size": ("vocab_size",),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}


def first(fields: Fields, keys: tuple[str, ...]) -> Any:
    """The value of the first key that is present and not None, else None."""
    return next((fields[key] for key in keys if fields.get(key) is not None), None)


def load_fields(source: Any) -> tuple[dict[str, Any], Any]:
    """A config as plain fields, and the transformers config object if there can be one.

    source: a transformers config, a dict, or the path of a `config.json` or its folder. Raises
    ConfigError, one line, for a file that is missing or no JSON object, and for fields that the
    config class of a known `model_type` rejects.
    """
    if isinstance(source, str | Path):
        source = read_json(Path(source))
    if isinstance(source, Mapping):
        given = dict(source)
        config = _known_config(given)
        return (given if config is None else _as_dict(config)), config
    if hasattr(source, "to_dict") and hasattr(source, "model_type"):
        config = copy.deepcopy(source)
        return _as_dict(config), config
    raise ConfigError(
        f"cannot read a model config from {type(source).__name__}; give a transformers config,"
        " a dict, or the path of a config.json"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a `config.json` (or of the one in a folder); ConfigError otherwise."""
    file = path / "config.json" if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            raw = opened.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES or raw.startswith(_WEIGHTS):
            raise ConfigError(f"{file}: holds weights or other data; give the model's config.json")
        value = json.loads(raw.decode("utf-8-sig"))
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{file}: JSON nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: holds a {type(value).__name__}, not a JSON object")
    if not isinstance(value.get("model_type"), str) or not value["model_type"]:
        raise ConfigError(f"{file}: has no model_type; is it a model's config.json?")
    return value


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """An error's message on one line, shortened."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _as_dict(config: Any) -> dict[str, Any]:
    try:
        return dict(config.to_dict())
    except Exception as error:
        raise ConfigError(f"{type(config).__name__}: to_dict() failed: {one_line(error)}") from None


def _known_config(fields: dict[str, Any]) -> Any:
    """The config object of a known model type, or None for a type that transformers lacks."""
    from transformers import CONFIG_MAPPING

    name = fields.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        return None
    check_sizes(text_fields(fields), required=False)
    try:
        return CONFIG_MAPPING[name].from_dict(copy.deepcopy(fields))
    except Exception as error:  # strict dataclass validators raise many types
        raise ConfigError(f"{name} config is invalid: {one_line(error)}") from None


def text_fields(fields: Fields) -> Fields:
    """The fields of the language model: the nested text config if there is one."""
    for key in ("text_config", "language_config", "llm_config", "thinker_config", "decoder"):
        nested = fields.get(key)
        if isinstance(nested, Mapping):
            return text_fields(nested)
    return fields


def derived_sizes(config: Any) -> dict[str, int]:
    """Sizes that a config object computes or renames, and so does not write out."""
    text = config.get_text_config()
    found = {}
    for name in SIZE_ALIASES:
        try:
            value = getattr(text, name, None)
        except Exception:  # a size that differs from layer to layer has no single value
            continue
        if isinstance(value, int):
            found[name] = value
    return found


def check_sizes(text: Fields, required: bool = True) -> dict[str, int]:
    """The sizes of the language model by their usual names; ConfigError for a nonsensical one."""
    sizes: dict[str, int] = {}
    for name, aliases in SIZE_ALIASES.items():
        value = first(text, aliases)
        if value is None:
            if required and name in ("hidden_size", "num_hidden_layers", "vocab_size"):
                raise ConfigError(f"config has no {name}; it describes no language model")
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number")
        if not 0 < value <= LIMITS[name]:
            raise ConfigError(f"{name} is {value}; it must lie between 1 and {LIMITS[name]}")
        sizes[name] = value
    kv = text.get("num_key_value_heads")
    if isinstance(kv, int) and not isinstance(kv, bool):
        if not 0 < kv <= LIMITS["num_key_value_heads"]:
            raise ConfigError(f"num_key_value_heads is {kv}; it must be positive")
        heads = sizes.get("num_attention_heads")
        if heads and heads % kv:
            raise ConfigError(f"num_attention_heads {heads} is no multiple of {kv} key/value heads")
    return sizes


def layer_types(text: Fields, count: int) -> tuple[str, ...]:
    """The type of every layer: as listed, or by the window alone where nothing is listed."""
    listed = first(text, ("layer_types", "layers_block_type"))
    if isinstance(listed, list | tuple) and len(listed) == count:
        return tuple(str(item) for item in listed)
    slides = text.get("sliding_window") and text.get("use_sliding_window", True)
    return ("sliding_attention" if slides else "full_attention",) * count


def window(text: Fields, types: tuple[str, ...]) -> int | None:
    """The width of the sliding window, or None when no layer slides."""
    width = text.get("sliding_window")
    if isinstance(width, int) and width > 0 and any("sliding" in kind for kind in types):
        return width
    return None


def shared_kv(text: Fields, types: tuple[str, ...]) -> dict[int, int]:
    """Consumer layer → producer layer: the last `num_kv_shared_layers` layers reuse the keys and
    values of the last producing layer *of their own type* (families.md §5)."""
    count = text.get("num_kv_shared_layers") or 0
    if not isinstance(count, int) or not 0 < count < len(types):
        return {}
    start = len(types) - count
    found = {}
    for consumer in range(start, len(types)):
        same = [layer for layer in range(start) if types[layer] == types[consumer]]
        if same:
            found[consumer] = same[-1]
    return found


def experts(text: Fields) -> ExpertFacts | None:
    """The routed experts that the fields describe; ConfigError when top-k exceeds their number."""
    num, top_k = first(text, EXPERT_KEYS), first(text, TOP_K_KEYS)
    num = max(num) if isinstance(num, list | tuple) and num else num
    top_k = max(top_k) if isinstance(top_k, list | tuple) and top_k else top_k
    if text.get("enable_moe_block") is False or not isinstance(num, int) or num < 2:
        return None
    if not isinstance(top_k, int):
        top_k = 1
    if not 0 < top_k <= num:
        raise ConfigError(
            f"{top_k} experts a token of {num} experts; it must lie between 1 and {num}"
        )
    width = first(text, WIDTH_KEYS)
    shared = first(text, SHARED_KEYS)
    key = next((k for k in ("hidden_act", "hidden_activation") if text.get(k)), "")
    return ExpertFacts(
        num=num,
        top_k=top_k,
        width=width if isinstance(width, int) else 0,
        activation=str(text.get(key, "")),
        activation_key=key,
        shared=isinstance(shared, int) and shared > 0,
        auxiliary_loss="router_aux_loss_coef" in text,
    )


def kv_head_counts(fields: Fields, text: Fields) -> tuple[int, ...]:
    """Every number of key/value heads that some layer has, the usual one first."""
    found = [text.get("num_key_value_heads"), text.get("num_global_key_value_heads")]
    per_layer = text.get("per_layer_config")
    if isinstance(per_layer, Mapping):
        found += [
            v.get("num_key_value_heads") for v in per_layer.values() if isinstance(v, Mapping)
        ]
    flat: list[int] = []
    for item in found:
        for value in item if isinstance(item, list | tuple) else [item]:
            if isinstance(value, int) and value > 0:
                flat.append(value)
    return tuple(dict.fromkeys(flat)) or (int(first(text, ("num_attention_heads",)) or 1),)


def has_part(fields: Fields, word: str) -> bool:
    """Whether a sub-config for `vision` or `audio` is there and filled."""
    return any(
        word in key and key.endswith("config") and isinstance(value, Mapping) and bool(value)
        for key, value in fields.items()
    )


def head_width(text: Fields, sizes: Mapping[str, int]) -> int:
    """The width of the widest attention head: gemma4's full-attention layers have their own."""
    own = text.get("per_layer_config")
    layers = [v for v in own.values() if isinstance(v, Mapping)] if isinstance(own, Mapping) else []
    named = [
        value
        for part in (text, *layers)
        for key, value in part.items()
        if key.endswith("head_dim") and not key.startswith("linear_") and isinstance(value, int)
    ]
    return max(named, default=sizes["hidden_size"] // sizes.get("num_attention_heads", 1))
