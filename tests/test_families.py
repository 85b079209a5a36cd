"""The families as data: they build, step, share weights and are the published models, small."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from conformance import fidelity
from conformance.batches import IGNORE, audio_inputs, pack, samples, stack
from conformance.case import Model
from conformance.checkpoint import available, build_config, build_stock, checkpoint
from conformance.families import MODELS
from conformance.weights import canonical_name, fill, fill_adapters

BUILDABLE = [model for model in MODELS.values() if available(model) is None]
TWINS = [model for model in BUILDABLE if model.text_model]
PUBLISHED = sorted((fidelity.fixtures_dir() / "published").glob("*.json"))
# Parameters of the whole model in units of 1e9: the names say them, or the cards do.
BILLIONS = {
    "gemma3-1b": (0.9, 1.1),
    "gemma3-4b": (3.8, 4.6),
    "gemma3n-e2b": (4.0, 5.0),
    "gemma4-26b-a4b": (24.0, 28.0),
    "gemma4-31b": (29.0, 33.0),
    "gemma4-e2b": (4.5, 5.7),
    "gemma4-e4b": (7.0, 8.7),
    "gemma4-unified-12b": (11.0, 13.0),
    "mixtral-8x7b": (46.0, 47.5),
    "qwen1.5-moe-a2.7b": (14.0, 14.6),
    "qwen3-30b-a3b": (30.0, 31.0),
    "qwen3-next-80b-a3b": (78.0, 82.0),
    "qwen3.5-35b-a3b": (34.0, 36.5),
    "qwen3.5-dense": (8.0, 11.0),
}

every_model = pytest.mark.parametrize("model", BUILDABLE, ids=lambda model: model.name)


def kinds(model: Model) -> list[str]:
    found = ["text", "padded", "mixed" if model.images else "text"]
    return list(dict.fromkeys(found + (["audio"] if audio_inputs(model) else [])))


def language_parameters(model: Model, net: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {
        name: parameter
        for name, parameter in net.named_parameters()
        if not set(name.split(".")) & set(model.freeze)
    }


def test_no_model_is_missing_on_the_pinned_version() -> None:
    """A misspelt class would make a whole family `unsupported`, which fails nothing."""
    lines = (Path(__file__).parents[1] / "ci" / "constraints.txt").read_text().splitlines()
    pinned = next(line for line in lines if line.startswith("transformers==")).partition("==")[2]
    if Version(transformers.__version__) < Version(pinned):
        pytest.skip(f"unavailable: transformers {transformers.__version__} lacks what {pinned} has")
    missing = {model.name: available(model) for model in MODELS.values() if available(model)}
    assert not missing, missing


@pytest.mark.parametrize("model", BUILDABLE, ids=lambda model: model.name)
def test_the_wrap_class_is_that_of_the_layers(model: Model) -> None:
    built = build_stock(model, torch.float32)
    layers = built.get_submodule(model.layers)
    assert {type(layer).__name__ for layer in layers} == {model.wrap_class}


@every_model
def test_model_starts_near_ln_v_and_every_weight_of_the_decoder_learns(model: Model) -> None:
    net = build_stock(model)
    for kind in kinds(model):
        net.zero_grad()
        batch = stack(samples(model, kind, count=4))
        loss = net(**batch).loss
        loss.backward()
        assert abs(loss.item() - math.log(model.text_config["vocab_size"])) < 0.5, kind
        decoder = language_parameters(model, net)
        idle = [n for n, p in decoder.items() if p.grad is None or not p.grad.any()]
        assert not idle, f"{kind}: no gradient in {idle}"
        if kind in ("mixed", "audio"):
            others = [p for n, p in net.named_parameters() if n not in decoder]
            assert any(p.grad is not None and p.grad.any() for p in others), kind
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    after = net(**batch).loss
    assert after < loss, (after, loss)


@every_model
def test_several_experts_are_used(model: Model) -> None:
    net = build_stock(model)
    net(**stack(samples(model, "padded", count=4))).loss.backward()
    experts = [p for n, p in net.named_parameters() if n.endswith("experts.down_proj")]
    assert bool(experts) == ("moe" in model.traits)
    for weight in experts:
        assert weight.grad is not None
        used = int(weight.grad.flatten(1).any(1).sum())
        assert used > len(weight) // 2, f"{used} of {len(weight)} experts used"


@every_model
def test_no_weight_of_the_decoder_is_square(model: Model) -> None:
    net = build_stock(model)
    square = [
        name
        for name, parameter in language_parameters(model, net).items()
        if parameter.dim() > 1 and parameter.shape[-1] == parameter.shape[-2]
        if "altup" not in name  # AltUp maps the width to itself
    ]
    assert not square


@every_model
def test_tiny_is_the_published_model_but_for_its_sizes(model: Model) -> None:
    config = build_config(model)
    assert fidelity.differences(config, fidelity.published_config(model)) == {}
    assert fidelity.fixture_faults(model) == []


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gemma4-e2b", "num_kv_shared_layers", 0),
        ("gemma4-e2b", "hidden_activation", "silu"),
        ("gemma4-e4b", "use_double_wide_mlp", True),
        ("gemma4-moe", "use_bidirectional_attention", None),
        ("gemma4-moe", "enable_moe_block", False),
        ("gemma4-dense", "attention_k_eq_v", False),
        ("gemma4-text", "final_logit_softcapping", None),
        ("gemma4-text", "layer_types", ["sliding_attention", "full_attention"] * 3),
        ("gemma3-text", "layer_types", ["full_attention"] * 6),
        ("gemma3-text", "rope_parameters", None),
        ("gemma3n", "activation_sparsity_pattern", [0.0] * 6),
        ("qwen3_moe", "norm_topk_prob", False),
        ("qwen3_5-text", "layer_types", ["full_attention"] * 6),
        ("mixtral", "hidden_act", "gelu"),
    ],
)
def test_a_difference_that_is_no_size_is_seen(name: str, field: str, value: Any) -> None:
    model = MODELS[name]
    if available(model):
        return
    tiny = changed(model, field, value)
    seen = fidelity.differences(build_config(tiny), fidelity.published_config(model))
    assert seen and all(field in key for key in seen), seen


@pytest.mark.parametrize(
    ("name", "field", "value", "fault"),
    [
        ("mixtral", "hidden_size", 40, "hidden and expert are both 40"),
        ("mixtral", "hidden_size", 80, "hidden and 2 x expert are both 80"),
        ("gemma4-moe", "intermediate_size", 44, "mlp 44 is no multiple of 8"),
        ("gemma4-moe", "num_global_key_value_heads", 1, "num_global_key_value_heads 1 is odd"),
        ("gemma4-moe", "num_experts", 5, "num_experts 5 is odd"),
        ("gemma4-text", "num_hidden_layers", 4, "6 layer types for 4 layers"),
        ("gemma4-text", "layer_types", ["sliding_attention"] * 5 + ["full_attention"], "a single"),
        ("gemma4-e2b", "num_kv_shared_layers", 1, "no consumer of type sliding_attention"),
        ("gemma4-e2b", "hidden_size_per_layer_input", 0, "without per-layer inputs crashes"),
        ("gemma4-text", "sliding_window", 7, "within twice the window 7"),
        ("gemma4-dense", "sliding_window", 40, "straddles"),
        ("gemma4-text", "vocab_size", 96, "tile multiple"),
        ("gemma4-dense", "vocab_size", 93, "outside the vocabulary"),
        ("gemma4-text", "attention_k_eq_v", False, "trait attention_k_eq_v"),
    ],
)
def test_a_fixture_fault_is_seen(name: str, field: str, value: Any, fault: str) -> None:
    faults = fidelity.fixture_faults(changed(MODELS[name], field, value))
    assert any(fault in line for line in faults), faults


def changed(model: Model, field: str, value: Any) -> Model:
    tiny = copy.deepcopy(dict(model.tiny))
    tiny.get("text_config", tiny)[field] = value
    return dataclasses.replace(model, tiny=tiny)


def test_a_pattern_ignores_where_the_last_run_is_cut() -> None:
    assert fidelity.pattern("ssfssfs") == fidelity.pattern("ssssfssssfss")
    assert fidelity.pattern("ssfssf") != fidelity.pattern("sfsf")
    assert fidelity.pattern("ff") == [("f", "several")]


@pytest.mark.parametrize("model", TWINS, ids=lambda model: model.name)
def test_text_twin_equals_the_multimodal_model_on_text(model: Model) -> None:
    assert model.text_model
    whole, text = build_stock(model), build_stock(MODELS[model.text_model])
    batch = stack(samples(model, "padded", count=3))
    results = []
    for net in (whole, text):
        out = net(**batch)
        out.loss.backward()
        grads = {canonical_name(n): p.grad for n, p in net.named_parameters()}
        results.append((out.loss, out.logits, grads))
    (loss, logits, grads), (text_loss, text_logits, text_grads) = results
    assert torch.equal(loss, text_loss) and torch.equal(logits, text_logits)
    for name, gradient in text_grads.items():
        assert gradient is not None and torch.equal(gradient, grads[name]), name


@pytest.mark.parametrize("model", TWINS, ids=lambda model: model.name)
def test_weights_are_the_same_in_every_class(model: Model) -> None:
    assert model.text_model
    named = {canonical_name(n): t for n, t in build_stock(model).state_dict().items()}
    text = build_stock(MODELS[model.text_model]).state_dict()
    for name, tensor in text.items():
        assert torch.equal(tensor, named[canonical_name(name)]), name


@every_model
def test_float64_holds_exactly_the_float32_weights(model: Model) -> None:
    single, double = build_stock(model), build_stock(model, torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    wide = double.state_dict()
    for name, tensor in single.state_dict().items():
        assert torch.equal(tensor.double(), wide[name]), name
        assert tensor.isfinite().all(), name
    batch = stack(samples(model, "text"))
    assert abs(single(**batch).loss.item() - double(**batch).loss.item()) < 1e-5


@every_model
def test_nothing_is_left_at_a_round_number(model: Model) -> None:
    net = build_stock(model)
    once = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, tensor in once.items():
        assert not (tensor == tensor.round()).any(), name
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.fill_(7.0)
    fill(net)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, once[name]), f"{name} depends on what was there before"


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.a", "layers.0.a"),
        ("module.model.layers.0._checkpoint_wrapped_module.a", "layers.0.a"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "layers.0.q_proj.weight"),
        ("model.vision_tower.vision_model.encoder.a", "vision_tower.encoder.a"),
        ("a.parametrizations.gate_up_proj.original", "a.gate_up_proj"),
        ("a.experts.base_layer.lora_A.default.weight", "a.experts.base_layer.lora_A.weight"),
    ],
)
def test_canonical_name(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


def test_adapters_are_filled_on_request_and_b_is_not_zero() -> None:
    peft = pytest.importorskip("peft")
    model = MODELS["mixtral"]
    spec = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    net = peft.get_peft_model(build_stock(model), spec)
    before = {n: p.clone() for n, p in net.named_parameters() if "lora_" not in n}
    factors = {n: p for n, p in net.named_parameters() if "lora_" in n}
    assert fill_adapters(net) == len(factors) == 2 * (2 * 2 + 2 * 2)
    assert all(p.any() for p in factors.values())
    fill(net)
    for name, parameter in net.named_parameters():
        assert "lora_" in name or torch.equal(parameter, before[name]), name


def test_weights_on_meta_are_refused() -> None:
    with torch.device("meta"):
        net = torch.nn.Linear(3, 4)
    with pytest.raises(ValueError, match="meta device"):
        fill(net)


@every_model
def test_checkpoint_loads_as_the_same_model(model: Model) -> None:
    path = checkpoint(model)
    assert path == checkpoint(model)
    kind = getattr(transformers, model.model_class)
    loaded, info = kind.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    stock = build_stock(model).state_dict()
    state = loaded.state_dict()
    assert state.keys() == stock.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, stock[name]), name


def test_checkpoints_vanish_with_their_process() -> None:
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    worker = context.Process(target=_report_checkpoint, args=(writer,))
    worker.start()
    folder = reader.recv()
    worker.join()
    assert worker.exitcode == 0
    assert folder.name == "gemma3n-float64" and not folder.parent.exists()
    assert checkpoint(MODELS["mixtral"]).is_dir(), "a worker's end took its parent's checkpoints"


def _report_checkpoint(writer: Any) -> None:
    folder = checkpoint(MODELS["gemma3n"], "float64")
    assert folder.is_dir()
    writer.send(folder)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_config_loads_and_has_its_size(path: Any) -> None:
    data = json.loads(path.read_text())
    sources = data.pop("_sources")
    (name,) = data["architectures"]
    kind = getattr(transformers, name, None)
    if kind is None:  # this transformers has no such class; another one's test has
        return
    with torch.device("meta"):
        net = kind(kind.config_class.from_dict(data))
    low, high = BILLIONS[path.stem]
    assert low < sum(p.numel() for p in net.parameters()) / 1e9 < high
    named = [key for keys in sources.values() for key in keys]
    assert sorted(named) == sorted(set(leaves(data)) - {"architectures"})


def leaves(data: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in data.items():
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{name}.")
        elif name != "model_type":
            found.append(prefix + name)
    return found


@every_model
def test_batches_are_deterministic_and_within_the_text_vocabulary(model: Model) -> None:
    for kind in kinds(model):
        first, again = samples(model, kind, count=3), samples(model, kind, count=3)
        other = samples(model, kind, seed=1, count=3)
        for a, b, c in zip(first, again, other, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
            assert not torch.equal(a["input_ids"], c["input_ids"])
            learned = a["labels"][a["labels"] != IGNORE]
            assert learned.min() >= 3 and learned.max() < model.text_vocab
        batch = stack(first)
        lengths = {len(sample["input_ids"]) for sample in first}
        assert ("attention_mask" in batch) == (len(lengths) > 1)
        assert "position_ids" not in batch


def test_a_packed_row_restarts_and_ignores_first_labels() -> None:
    documents = samples(MODELS["mixtral"], "packed", count=3)
    row = pack(documents)
    lengths = [len(document["input_ids"]) for document in documents]
    expected = [position for length in lengths for position in range(length)]
    assert row["position_ids"].tolist() == [expected]
    assert "attention_mask" not in row
    starts = [i for i, position in enumerate(expected) if position == 0]
    assert row["labels"][0, starts].tolist() == [IGNORE] * 3
    assert int((row["labels"] != IGNORE).sum()) > 0


def test_bad_requests_get_one_clear_line() -> None:
    model = MODELS["mixtral"]
    for kind, words in (("images", "takes no images"), ("audio", "no audio"), ("x", "unknown")):
        with pytest.raises(ValueError, match=words):
            samples(model, kind)
    missing = dataclasses.replace(model, model_class="NoSuchModel")
    assert "no NoSuchModel" in str(available(missing))
    with pytest.raises(ValueError, match="NoSuchModel"):
        build_stock(missing)


def test_families_import_no_torch() -> None:
    code = "import conformance.families, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
