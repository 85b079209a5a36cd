"""Every strategy of `impl.parallel` against one process: losses, gradients, one optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conformance import ranks
from impl import parallel, parallel_tensor
from impl.errors import Refused
from impl.parallel_plan import ParallelPlan
from tests import parallel_functions as functions
from tests import tiny_models

pytestmark = pytest.mark.ranks

DATA_PARALLEL = 1e-5  # noise seen: 3.5e-6 (hsdp, gemma4-moe)
TENSOR_PARALLEL = 1e-4  # noise seen: 1.4e-5 (tp, gemma4-e2b)
DELTA_NET = 2e-4  # noise seen: 3.3e-5 (qwen3_next)
FLOAT64_STEP = 1e-6  # noise seen: 8.0e-7 (float32 islands inside transformers)


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The worst tensor's relative error, against max(own norm, 1e-4 × global norm), and its name.

    A strategy may have a zero where one process has no gradient at all (FSDP1's flat parameters).
    """
    assert wanted.keys() <= found.keys(), sorted(wanted.keys() - found.keys())
    for name in found.keys() - wanted.keys():
        assert not found[name].any(), f"{name} has a gradient that one process does not give"
    norms = {name: tensor.double().norm().item() for name, tensor in wanted.items()}
    floor = 1e-4 * sum(norm**2 for norm in norms.values()) ** 0.5
    errors = {
        name: (found[name].double() - wanted[name].double()).norm().item() / max(norms[name], floor)
        for name in wanted
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def agree(evidence: list[Any], wanted: Any, tolerance: float, step: float | None = None) -> None:
    """All ranks' evidence of one job is that of one process."""
    first = evidence[0]
    assert first["loss"].item() == pytest.approx(wanted["loss"].item(), rel=1e-6)
    assert first["norm"].item() == pytest.approx(wanted["norm"].item(), rel=1e-5)
    worst, name = error(first["gradients"], wanted["gradients"])
    assert worst <= tolerance, f"gradient of {name}: {worst:.1e} > {tolerance:.0e}"
    if step is not None:
        worst, name = error(first["parameters"], wanted["parameters"])
        assert worst <= step, f"{name} after the step: {worst:.1e} > {step:.0e}"
    for other in evidence[1:]:
        for kind in ("gradients", "parameters"):
            for name, total in other[kind].items():
                assert total == first[kind][name].double().sum(), f"{name} differs between ranks"


def check_jobs(jobs: list[functions.Job], tolerance: float, world: int = 2, **kwargs: Any) -> None:
    """Run jobs on fresh ranks and in this process, and compare."""
    found = ranks.run(world, functions.steps, jobs)
    for index, (name, _, options, batch) in enumerate(jobs):
        wanted = functions.single(name, options, batch)
        agree([each[index] for each in found], wanted, tolerance, **kwargs)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("gemma4-e2b", DATA_PARALLEL), ("qwen3_5_moe", DELTA_NET)],
)
def test_prepared_model_is_spread_without_a_trace(name: str, tolerance: float) -> None:
    """Data and context parallel give the gradients of one process, with and without
    checkpointing."""
    batch = tiny_models.rows()
    jobs = [(name, strategy, {}, batch) for strategy in ("ddp", "fsdp1", "fsdp2", "cp")]
    jobs += [(name, strategy, {"checkpointing": True}, batch) for strategy in ("fsdp2", "cp")]
    check_jobs(jobs, tolerance)


def test_one_step_in_float64() -> None:
    """One AdamW step in float64 leads to the same parameters, under every spreading strategy."""
    batch = tiny_models.rows()
    options = {"dtype": torch.float64}
    jobs = [
        ("gemma4-moe", strategy, options, batch) for strategy in ("ddp", "fsdp1", "fsdp2", "cp")
    ]
    check_jobs(jobs, FLOAT64_STEP, step=FLOAT64_STEP)


def test_hybrid_sharding() -> None:
    """Sharded over two ranks, replicated over two pairs."""
    check_jobs([("gemma4-moe", "hsdp", {}, tiny_models.rows())], DATA_PARALLEL, world=4)


def test_adapters_under_data_and_context_parallel(tmp_path: Path) -> None:
    """LoRA on modules and on stacked experts; the gathered adapter equals the whole."""
    batch = tiny_models.rows()
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    options = {"lora": ["q_proj", "v_proj"], "lora_parameters": experts}
    jobs = [("mixtral", "ddp", options, batch), ("mixtral", "cp", options, batch)]
    jobs.append(("mixtral", "fsdp2", {**options, "save": str(tmp_path)}, batch))
    check_jobs(jobs, DATA_PARALLEL)
    from safetensors.torch import load_file

    wanted = functions.single("mixtral", options, batch)["parameters"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == sum(".lora_" in name for name in wanted) == 16
    for name, tensor in saved.items():
        canonical = parallel.canonical_name(name).replace(".weight", ".default.weight")
        assert torch.allclose(tensor, wanted[canonical], rtol=1e-3, atol=1e-5), name


def test_context_parallel_sees_across_the_border() -> None:
    """An image across the cut, packed documents, and a row length that ranks do not divide."""
    images = tiny_models.image_rows()
    assert images["mm_token_type_ids"][0, 6:8].all(), "the image must straddle the cut at 7"
    images["pixel_values"] = images["pixel_values"].double()
    packed = tiny_models.packed_row()
    double: dict[str, Any] = {"dtype": torch.float64}
    eager = {"config": {"attn_implementation": "eager"}}
    jobs = [
        ("gemma4-vision", "cp", double, images),
        ("gemma4-vision", "cp", {**double, "freeze": ("vision_tower",)}, images),
        ("gemma4-moe", "cp", double, packed),
        ("gemma4-e2b", "cp", {**double, **eager}, packed),
        ("gemma3n", "cp", double, tiny_models.rows()),
    ]
    check_jobs(jobs, FLOAT64_STEP)


def test_unequal_ranks() -> None:
    """A rank without labels, and towers that no rank or one rank feeds."""
    batch = tiny_models.rows()
    batch["labels"][:2] = -100
    unused = {"plan": {"find_unused_parameters": True}}
    jobs = [("mixtral", "ddp", {}, batch), ("mixtral", "fsdp2", {}, batch)]
    jobs.append(("gemma4-vision", "ddp", unused, tiny_models.rows()))
    jobs.append(("gemma4-vision", "fsdp1", {}, tiny_models.rows()))
    frozen = {"freeze": ("vision_tower", "embed_vision")}
    jobs.append(("gemma4-vision", "fsdp2", frozen, tiny_models.rows()))
    jobs.append(("gemma4-vision", "ddp", frozen, tiny_models.rows()))
    check_jobs(jobs, DATA_PARALLEL)


def test_mixed_precision_keeps_shared_keys_and_values() -> None:
    """FSDP2 casts the inputs of layers that share K/V, and the shared object is still one."""
    batch = tiny_models.rows()
    options = {"plan": {"dtype": torch.bfloat16}}
    found = ranks.run(2, functions.steps, [("gemma4-e2b", "fsdp2", options, batch)])
    wanted = functions.single("gemma4-e2b", {"dtype": torch.bfloat16}, batch)
    assert found[0][0]["loss"].item() == pytest.approx(wanted["loss"].item(), rel=2e-2)
    ratio = found[0][0]["norm"].item() / wanted["norm"].item()
    assert ratio == pytest.approx(1.0, abs=5e-2)


@pytest.mark.parametrize("name", ["mixtral", "gemma4-moe"])
def test_sharded_while_loading(name: str, tmp_path: Path) -> None:
    """Tensor and expert parallel: local experts are a part, gradients are those of one process."""
    batch = tiny_models.rows()
    functions.checkpoint(name, tmp_path)
    jobs: list[Any] = [(name, strategy, {}, batch) for strategy in ("tp", "tp_ep", "fsdp2_ep")]
    eager = {"experts_implementation": "eager"}
    jobs.append((name, "fsdp2_ep", eager, batch))
    lora = {"lora": ["q_proj", "v_proj"]}
    jobs += [(name, strategy, lora, batch) for strategy in ("tp", "fsdp2_ep")]
    found = ranks.run(2, functions.sharded_steps, tmp_path, jobs)
    for index, (_, strategy, options, _) in enumerate(jobs):
        evidence = [each[index] for each in found]
        wanted = functions.loaded_single(name, tmp_path, options, batch)
        agree(evidence, wanted, TENSOR_PARALLEL)
        expected = (6, 6) if strategy == "tp" else (3, 6)
        assert set(evidence[0]["experts"].values()) == {expected}


def test_one_sharded_step_in_float64(tmp_path: Path) -> None:
    """Expert gradients are divided once in float64 too, where torch would divide them twice."""
    functions.checkpoint("mixtral", tmp_path, torch.float64)
    batch = tiny_models.rows()
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    jobs = [("mixtral", strategy, options, batch) for strategy in ("tp_ep", "fsdp2_ep")]
    found = ranks.run(2, functions.sharded_steps, tmp_path, jobs)
    wanted = functions.loaded_single("mixtral", tmp_path, options, batch)
    for index in range(len(jobs)):
        agree([each[index] for each in found], wanted, FLOAT64_STEP, FLOAT64_STEP)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_accumulation_without_sync(strategy: str) -> None:
    """Two micro-batches reduced once give the gradients of two reductions, and of one process."""
    once = ranks.run(2, functions.accumulated, strategy, False)[0]
    twice = ranks.run(2, functions.accumulated, strategy, True)[0]
    wanted = functions.single("mixtral", {}, tiny_models.rows(8))["gradients"]
    assert error(once, wanted)[0] <= DATA_PARALLEL
    assert error(once, twice)[0] <= DATA_PARALLEL


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_clipping(strategy: str) -> None:
    """The norm and the clipped gradients are those of one process."""
    context = ranks.RankContext(0, 1, 0, "cpu", Path(), 1.0)
    norm, wanted = functions.clipped(context, "single")
    assert norm > 0.2, "the norm must be one that is clipped"
    for found_norm, found in ranks.run(2, functions.clipped, strategy):
        assert found_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert error(found, wanted)[0] <= DATA_PARALLEL


@pytest.mark.parametrize("strategy", ["ddp", "cp"])
def test_the_models_own_loss(strategy: str) -> None:
    """Labels are shifted once, over the whole row."""
    wanted = functions.single("mixtral", {}, tiny_models.rows())["loss"].item()
    for found in ranks.run(2, functions.own_loss, "mixtral", strategy):
        assert found.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "strategy", "options", "message"),
    [
        ("mixtral", "fsdp1", {"lora": ["q_proj"]}, "fsdp1 with adapters"),
        ("mixtral", "fsdp2", {"wrap": ("NoSuchLayer",)}, "no module of class NoSuchLayer"),
        ("mixtral", "fsdp2", {"wrap": ()}, "no class to wrap"),
        ("mixtral", "cp", {"config": {"output_router_logits": True}}, "auxiliary loss"),
        ("mixtral", "cp", {"batch": tiny_models.rows(2, 1)}, "cannot be split over 2 ranks"),
        ("mixtral", "tp", {}, "no weight of the model is sharded"),
    ],
)
def test_refusals(name: str, strategy: str, options: dict[str, Any], message: str) -> None:
    """What would train wrongly is refused in one line that says what."""
    for said in ranks.run(2, functions.refusal, name, strategy, options):
        assert message in said
        assert "\n" not in said


def test_reentrant_checkpointing_under_unused_parameters_is_refused() -> None:
    """DDP would mark a parameter ready twice."""
    model = functions.prepared("mixtral", {"checkpointing": "reentrant"})
    with pytest.raises(Refused, match="ready twice"):
        parallel.parallel_data.ddp(model, None, find_unused_parameters=True)


def test_sizes_that_ranks_do_not_divide() -> None:
    """Heads and experts that ranks do not divide are refused before loading."""
    config = tiny_models.build("gemma4-moe").config
    with pytest.raises(Refused, match="num_attention_heads is 4, which 3 ranks"):
        parallel_tensor.check_divisible(config, ParallelPlan.of("tp", (), 3))
    with pytest.raises(Refused, match="4 ranks do not divide 6 experts"):
        parallel_tensor.check_divisible(config, ParallelPlan.of("fsdp2_ep", (), 4))


def test_layouts_that_tensor_parallel_gets_wrong() -> None:
    """Statistics over sharded features, and a table that is read past its shards, are refused."""
    plan = ParallelPlan.of("tp", (), 2)
    with pytest.raises(Refused, match="activation sparsity"):
        parallel_tensor.refuse_layouts(tiny_models.build("gemma3n").config, plan)
    text = tiny_models.TINY["gemma4-e2b"][3]
    model = tiny_models.build("gemma4-vision", **{**text, "enable_moe_block": False})
    with pytest.raises(Refused, match="per-layer inputs"):
        parallel_tensor.refuse_layouts(model.config, plan)
    parallel_tensor.refuse_layouts(tiny_models.build("gemma4-e2b").config, plan)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("module.model.norm.weight", "model.norm.weight"),
        ("module.base_model.model.model.norm.weight", "model.norm.weight"),
        ("_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.a.b", "model.layers.0.a.b"),
        ("model.layers.0._checkpoint_wrapped_module.a.b", "model.layers.0.a.b"),
        ("base_model.model.a.q_proj.base_layer.weight", "a.q_proj.weight"),
        ("base_model.model.a.lora_A.default.weight", "a.lora_A.default.weight"),
        (
            "a.experts.base_layer.lora_A.default.weight",
            "a.experts.base_layer.lora_A.default.weight",
        ),
        ("_orig_mod.module.weight", "weight"),
    ],
)
def test_canonical_names(name: str, canonical: str) -> None:
    """One name a parameter, whatever wraps the model."""
    assert parallel.canonical_name(name) == canonical


def test_unknown_strategy() -> None:
    """A strategy that does not exist is named with those that do."""
    with pytest.raises(Refused, match="unknown strategy 'zero3'; it is one of single, ddp"):
        ParallelPlan("zero3")
