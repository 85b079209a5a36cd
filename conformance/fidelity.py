"""Is a tiny configuration the published one but for its sizes, and does it obey the fixture rules?

Two configurations are compared as dictionaries. A size counts only as present or absent (None and 0
are absent), so that a tiny model cannot lose shared K/V or experts. A layer pattern is
compared as a pattern: runs of equal layers, one or several, in order of appearance. The length of a
run (4:1 against 2:1) and where the last one is cut are sizes; that a run is longer than one is not.
Everything else must be equal: activation, softcap, sharing, bidirectionality, rotary bases, k = v.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

import conformance
from conformance.batches import IGNORE, KINDS, Sample, samples
from conformance.case import Model

SIZES = frozenset(
    {
        "vocab_size",
        "vocab_size_per_layer_input",
        "hidden_size",
        "hidden_size_per_layer_input",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_global_key_value_heads",
        "head_dim",
        "global_head_dim",
        "query_pre_attn_scalar",
        "max_position_embeddings",
        "sliding_window",
        "num_kv_shared_layers",
        "num_experts",
        "num_local_experts",
        "top_k_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "linear_num_key_heads",
        "linear_key_head_dim",
        "linear_num_value_heads",
        "linear_value_head_dim",
        "mrope_section",
        "max_window_layers",
        "altup_num_inputs",
        "laurel_rank",
        "depth",
        "num_heads",
        "out_hidden_size",
        "num_position_embeddings",
        "image_size",
        "patch_size",
        "pooling_kernel_size",
        "position_embedding_size",
        "mm_embed_dim",
        "mm_posemb_size",
        "output_proj_dims",
        "mm_tokens_per_image",
        "audio_embed_dim",
        "subsampling_conv_channels",
        "attention_chunk_size",
        "attention_context_left",
    }
)
PATTERNS = frozenset({"layer_types", "activation_sparsity_pattern"})
# Which token is which, who wrote the file, and what follows from the fields above.
IGNORED = frozenset(
    {
        "_name_or_path",
        "_sources",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "per_layer_config",
        "id2label",
        "label2id",
    }
)
_TOKEN_IDS = ("_token_id", "_token_index")


def fixtures_dir() -> Path:
    """The folder of committed data: beside the package in a checkout, inside it once installed."""
    package = Path(conformance.__file__).parent
    inside = package / "fixtures"
    return inside if inside.is_dir() else package.parent / "fixtures"


def published_data(model: Model) -> dict[str, Any]:
    """The published `config.json` of a model without its `_sources`: plain data.

    Raises ValueError, one line, where there is none, or one without sources.
    """
    path = fixtures_dir() / "published" / f"{model.published}.json"
    if not path.is_file():
        raise ValueError(f"model {model.name}: its published config, {path}, is not there")
    data: dict[str, Any] = json.loads(path.read_text())
    if not data.pop("_sources", None):
        raise ValueError(f"{path}: has no _sources; say where each size is from")
    return data


def published_config(model: Model) -> Any:
    """The published configuration as an instance of the model's own config class.

    A text-only model whose checkpoint is multimodal gets the `text_config` of the file.
    """
    data = published_data(model)
    kind = getattr(transformers, model.config_class)
    if "text_config" in data and "text_config" not in model.tiny:
        data = data["text_config"]
    return kind.from_dict(data)


def differences(tiny: Any, published: Any) -> dict[str, tuple[Any, Any]]:
    """What differs between two configs, apart from sizes: dotted name -> (tiny, published)."""
    return dict(_differences(_normal(tiny.to_dict()), _normal(published.to_dict()), ""))


def _differences(
    tiny: Mapping[str, Any], published: Mapping[str, Any], prefix: str
) -> list[tuple[str, tuple[Any, Any]]]:
    found = []
    for name in sorted({*tiny, *published}):
        ours, theirs = tiny.get(name), published.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += _differences(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            found.append((prefix + name, (ours, theirs)))
    return found


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config dictionary with sizes as presence, patterns as runs, ids and bookkeeping dropped."""
    normal: dict[str, Any] = {}
    for name, value in config.items():
        if name in IGNORED or name.endswith(_TOKEN_IDS):
            continue
        if isinstance(value, Mapping):
            normal[name] = _normal(value)
        elif name in SIZES:
            normal[name] = "present" if value else "absent"
        elif name in PATTERNS and value is not None:
            normal[name] = pattern(value)
        else:
            normal[name] = list(value) if isinstance(value, tuple) else value
    return normal


def pattern(layers: Sequence[Any]) -> list[tuple[Any, str]]:
    """The different runs of equal layers: `[s, s, f, s, s, f]` is `[(s, "several"), (f, "one")]`.

    The last run may be cut short, so it counts only where it is the only one of its kind.
    """
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(layers)]
    if runs[-1][0] in {kind for kind, _ in runs[:-1]}:
        runs.pop()
    return list(dict.fromkeys((kind, "several" if n > 1 else "one") for kind, n in runs))


def fixture_faults(model: Model) -> list[str]:
    """Each fixture rule that a model's tiny configuration or its batches break, in one line."""
    text = model.text_config
    return [
        *_shape_faults(text),
        *_layer_faults(text),
        *_vocabulary_faults(model),
        *_batch_faults(model),
        *_crash_faults(model),
        *_trait_faults(model),
    ]


def _shape_faults(text: Mapping[str, Any]) -> list[str]:
    """Widths that must be told apart by shape alone, split over two ranks, and be aligned."""
    heads = text["num_attention_heads"]
    widths = {"hidden": text["hidden_size"], "heads x head_dim": heads * text["head_dim"]}
    if "global_head_dim" in text:
        widths["heads x global_head_dim"] = heads * text["global_head_dim"]
    dense = text.get("intermediate_size")
    expert = text.get("moe_intermediate_size", dense if "num_local_experts" in text else None)
    if expert is not None:
        experts = text.get("num_experts", text.get("num_local_experts"))
        widths |= {"experts": experts, "expert": expert, "2 x expert": 2 * expert}
    if dense is not None and dense != expert:
        widths["mlp"] = dense[0] if isinstance(dense, list) else dense
    if "shared_expert_intermediate_size" in text:
        widths["shared expert"] = text["shared_expert_intermediate_size"]
    faults = [
        f"{a} and {b} are both {widths[a]}"
        for a, b in itertools.combinations(widths, 2)
        if widths[a] == widths[b]
    ]
    ple = (text.get("hidden_size_per_layer_input") or 0) * text["num_hidden_layers"]
    if ple == text["hidden_size"]:
        faults.append(f"hidden and layers x per-layer width are both {ple}")
    aligned = {name for name in widths if name != "experts"}
    faults += [f"{n} {widths[n]} is no multiple of 8" for n in sorted(aligned) if widths[n] % 8]
    halves = ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads")
    experts_keys = ("num_experts", "num_local_experts")
    odd = [n for n in (*halves, *experts_keys) if (text.get(n) or 0) % 2]
    return faults + [f"{name} {text[name]} is odd: two ranks cannot share it" for name in odd]


def _layer_faults(text: Mapping[str, Any]) -> list[str]:
    types = list(text.get("layer_types") or ["full_attention"] * text["num_hidden_layers"])
    faults = []
    if len(types) != text["num_hidden_layers"]:
        faults.append(f"{len(types)} layer types for {text['num_hidden_layers']} layers")
    faults += [f"a single {kind} layer" for kind in sorted(set(types)) if types.count(kind) < 2]
    if types[-1] != "full_attention":
        faults.append(f"the last layer is {types[-1]}")
    shared = text.get("num_kv_shared_layers") or 0
    if shared:
        producers, consumers = types[:-shared], types[-shared:]
        faults += [
            f"shared K/V: no {role} of type {kind}"
            for kind in sorted(set(types))
            for role, layers in (("producer", producers), ("consumer", consumers))
            if kind not in layers
        ]
        if len(producers) == len(set(types)):
            faults.append("shared K/V: every producer stores, none keeps its K/V to itself")
    return faults


def _vocabulary_faults(model: Model) -> list[str]:
    vocab = model.text_config["vocab_size"]
    faults = [] if vocab % 8 else [f"vocabulary {vocab} is a tile multiple"]
    special = {k: v for k, v in model.tiny.items() if k.endswith(_TOKEN_IDS)}
    faults += [f"{k} {v} is outside the vocabulary" for k, v in special.items() if v >= vocab]
    low = {k: v for k, v in special.items() if v < model.text_vocab}
    if "text_config" in model.tiny:
        faults += [f"{k} {v} is a text id" for k, v in low.items()]
    if model.text_vocab > vocab:
        faults.append(f"text ids reach {model.text_vocab}, the vocabulary {vocab}")
    return faults


def _batch_faults(model: Model) -> list[str]:
    window = model.text_config.get("sliding_window") or 0
    faults = []
    for kind in KINDS:
        try:
            batch = samples(model, kind, count=4)
        except ValueError:  # the model takes no such input
            continue
        labels = {int((sample["labels"][1:] != IGNORE).sum()) for sample in batch}
        if len(labels) < len(batch):
            faults.append(f"{kind}: equal numbers of labels in {len(batch)} samples: {labels}")
        lengths = [len(sample["input_ids"]) for sample in batch]
        total = sum(lengths) if kind == "packed" else min(lengths)
        if total <= 2 * window:
            faults.append(f"{kind}: {total} tokens are within twice the window {window}")
        if kind == "images" and window and not any(_straddles(model, s, window) for s in batch):
            faults.append(f"{kind}: no block of image tokens straddles the window")
    return faults


def _straddles(model: Model, sample: Sample, window: int) -> bool:
    assert model.images is not None
    block = (sample["input_ids"] == model.images.token_id).nonzero().flatten().tolist()
    return any(later // window > first // window for first, later in itertools.pairwise(block))


def _crash_faults(model: Model) -> list[str]:
    """Configurations that crash or degenerate in transformers; no released model has them."""
    text = model.text_config
    faults = []
    if text.get("num_kv_shared_layers") and not text.get("hidden_size_per_layer_input"):
        faults.append("shared K/V without per-layer inputs crashes")
    if model.tiny.get("vision_config", {}).get("pooling_kernel_size") == 1:
        faults.append("pooling_kernel_size 1 gives no image tokens")
    rope = text.get("rope_parameters") or {}
    if "mrope_section" in rope:
        pairs = int(text["head_dim"] * rope["partial_rotary_factor"]) // 2
        if sum(rope["mrope_section"]) != pairs or not all(rope["mrope_section"]):
            faults.append(f"mrope_section {rope['mrope_section']} does not fill {pairs} pairs")
    return faults


def _trait_faults(model: Model) -> list[str]:
    """Traits that the configuration shows and the model lacks, or the other way round."""
    text, types = model.text_config, model.text_config.get("layer_types") or []
    shown = {
        "moe": bool(text.get("num_experts") or text.get("num_local_experts")),
        "shared_expert": bool(text.get("shared_expert_intermediate_size")),
        "experts_in_layer": bool(text.get("enable_moe_block")),
        "vision": "vision_config" in model.tiny,
        "audio": "audio_config" in model.tiny,
        "kv_sharing": bool(text.get("num_kv_shared_layers")),
        "per_layer_inputs": bool(text.get("hidden_size_per_layer_input")),
        "linear_attention": "linear_attention" in types,
        "sliding_window": "sliding_attention" in types,
        "attention_k_eq_v": bool(text.get("attention_k_eq_v")),
        "tied_embeddings": bool(model.tiny["tie_word_embeddings"]),
        "softcap": bool(text.get("final_logit_softcapping")),
    }
    wrong = [trait for trait, has in shown.items() if has != (trait in model.traits)]
    return [f"trait {trait} and the configuration disagree" for trait in wrong]
