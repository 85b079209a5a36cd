"""`prepare` and `undo`: order, idempotence, nothing left behind; freezing and adapters."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from conformance import batches, checkpoint
from impl import patches
from impl.adapters import refuse_dropout
from impl.build import build
from impl.collate import collate
from impl.errors import ConfigError, Refused
from impl.freeze import freeze
from impl.loss import loss
from impl.patches.swap import swapped
from impl.prepare import prepare, undo
from impl.prepared import state_of
from impl.training_plan import LoraPlan
from tests.impl.plans import EXPERTS, LORA, make_plan, spec


@pytest.fixture(autouse=True)
def _nothing_global_is_left() -> Any:
    before = swapped()
    yield
    assert swapped() == before, "a global replacement was left behind"


LEFT_BY_TRANSFORMERS = {
    "_no_split_modules",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hooks",
}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a preparation could change."""
    config: Any = model.config
    return {
        "hooks": [
            (n, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()
        ],
        "instance": [
            (n, sorted(set(vars(m)) - LEFT_BY_TRANSFORMERS)) for n, m in model.named_modules()
        ],
        "split": list(model._no_split_modules or ()),  # type: ignore[arg-type]
        "modes": [(n, m.training) for n, m in model.named_modules()],
        "gradients": [(n, p.requires_grad) for n, p in model.named_parameters()],
        "router": getattr(config.get_text_config(), "output_router_logits", None),
        "loss": getattr(model, "accepts_loss_kwargs", None),
        "experts": config.get_text_config()._experts_implementation,
    }


FULL = {
    "gemma4-moe": {"freeze": ("vision_tower", "embed_vision")},
    "mixtral": {"auxiliary_loss": True, "experts_implementation": "batched_mm"},
    "qwen3_5_moe": {"freeze": ("visual",), "checkpointing": {"use_reentrant": False}},
    "gemma4-e2b": {"checkpointing": {"use_reentrant": False}, "freeze": ("audio_tower",)},
}


@pytest.mark.parametrize("name", FULL)
def test_undo_takes_everything_back(name: str) -> None:
    model = checkpoint.build_stock(spec(name)).train()
    model(input_ids=torch.arange(3, 9)[None])  # what a first forward leaves is not ours
    before = fingerprint(model)
    prepared = prepare(model, make_plan(spec(name), **FULL[name]))
    assert fingerprint(prepared) != before and state_of(prepared) is not None
    undo(prepared)
    after = fingerprint(prepared)
    after["instance"] = [
        (
            n,
            [
                a
                for a in names
                if a not in ("gradient_checkpointing", "_gradient_checkpointing_func")
            ],
        )
        for n, names in after["instance"]
    ]
    before["instance"] = [
        (
            n,
            [
                a
                for a in names
                if a not in ("gradient_checkpointing", "_gradient_checkpointing_func")
            ],
        )
        for n, names in before["instance"]
    ]
    for key in before:
        assert after[key] == before[key], key
    undo(prepared)  # a second time does nothing


def test_prepare_is_idempotent() -> None:
    model = checkpoint.build_stock(spec("gemma4-moe"))
    plan = make_plan(spec("gemma4-moe"), lora=LORA, freeze=("vision_tower",))
    prepared = prepare(model, plan)
    hooks = fingerprint(prepared.get_base_model())["hooks"]  # type: ignore[operator]
    assert prepare(prepared, plan) is prepared
    assert fingerprint(prepared.get_base_model())["hooks"] == hooks  # type: ignore[operator]
    with pytest.raises(Refused, match="another plan"):
        prepare(prepared, replace(plan, dtype="bfloat16"))
    undo(prepared)


def test_a_failure_half_way_leaves_nothing() -> None:
    name = "gemma4-moe"
    model = checkpoint.build_stock(spec(name)).train()
    before = fingerprint(model)
    keys = list(model.state_dict())
    plan = make_plan(
        spec(name), lora=LORA, freeze=("vision_tower",), experts_implementation="nonsense"
    )
    with pytest.raises(Refused, match="nonsense"):
        prepare(model, plan)
    after = fingerprint(model)
    assert list(model.state_dict()) == keys and state_of(model) is None
    for key in ("hooks", "split", "loss", "modes"):
        assert after[key] == before[key], key
    with pytest.raises(Refused, match="load-balancing"):
        prepare(model, make_plan(spec(name), auxiliary_loss=True))
    assert fingerprint(model)["hooks"] == before["hooks"]


def test_two_models_share_a_global_patch() -> None:
    plan = make_plan(spec("qwen3_5-text"), pack=True)
    first, second = (prepare(checkpoint.build_stock(spec("qwen3_5-text")), plan) for _ in range(2))
    samples = batches.samples(spec("qwen3_5-text"), "packed", count=3)
    batch = collate(samples, plan)
    right = loss(second, batch)
    undo(first)
    assert swapped() > 0 and torch.equal(loss(second, batch), right)
    undo(second)


def test_packed_equals_token_weighted_documents_for_every_family() -> None:
    for name in ("gemma4-moe", "gemma3-text", "gemma3n", "qwen3_5_moe", "qwen3_next", "mixtral"):
        plan = make_plan(spec(name), pack=True)
        model = prepare(checkpoint.build_stock(spec(name)), plan)
        samples = batches.samples(spec(name), "packed", count=4)
        packed = float(loss(model, collate(samples, plan), 9).detach())
        undo(model)
        alone = sum(float(loss(model, collate([s], make_plan()), 9).detach()) for s in samples)
        assert packed == pytest.approx(alone, rel=2e-6), name


def test_frozen_towers_stay_in_evaluation_mode() -> None:
    model: Any = checkpoint.build_stock(spec("gemma4-moe")).train()
    take_back = freeze(model, ("vision_tower", "embed_vision"))
    model.train()
    tower = model.model.vision_tower
    assert model.training and not any(part.training for part in tower.modules())
    assert not any(p.requires_grad for p in tower.parameters())
    assert all(p.requires_grad for p in model.model.language_model.parameters())
    twin = copy.deepcopy(model)
    twin.train()
    assert not twin.model.vision_tower.training and tower is not twin.model.vision_tower
    take_back()
    assert tower.training and all(p.requires_grad for p in tower.parameters())
    model.eval()
    model.train()
    assert tower.training


def adapted(name: str, lora: LoraPlan, **changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare(checkpoint.build_stock(spec(name)), make_plan(lora=lora, **changes))


def test_adapters_start_by_name_and_change_nothing() -> None:
    stock = checkpoint.build_stock(spec("mixtral")).eval()
    ids = torch.arange(3, 15)[None]
    torch.manual_seed(1)
    first = adapted("mixtral", LORA)
    torch.manual_seed(2)
    second = adapted("mixtral", LORA)
    a = {n: p for n, p in first.named_parameters() if "lora_" in n}
    b = {n: p for n, p in second.named_parameters() if "lora_" in n}
    assert a and all(torch.equal(a[n], b[n]) for n in a)
    matrices = [p.flatten()[:8] for n, p in a.items() if "lora_A" in n]
    assert not torch.equal(matrices[0], matrices[1])
    with torch.no_grad():
        assert torch.equal(first.eval()(input_ids=ids).logits, stock(input_ids=ids).logits)
    undo(first)
    undo(second)


def test_expert_leaves_that_reach_no_expert_are_said() -> None:
    with pytest.warns(UserWarning, match="adapts no routed expert"):
        model = prepare(checkpoint.build_stock(spec("gemma4-moe")), make_plan(lora=LORA))
    undo(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        undo(prepare(checkpoint.build_stock(spec("gemma4-text")), make_plan(lora=LORA)))


@pytest.mark.parametrize("name", ["gemma4-moe", "mixtral", "qwen3_5_moe"])
def test_expert_adapters_get_gradients(name: str) -> None:
    model = adapted(name, EXPERTS, experts_implementation="eager")
    batch = collate(batches.samples(spec(name), "text"), make_plan())
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.02)
    loss(model, batch).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("experts" in n and "lora_" in n for n in trained)
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trained.values())
    undo(model)


def test_adapters_of_nothing_or_of_frozen_parts_are_refused() -> None:
    absent = LoraPlan(target_modules=r"model\.language_model\.layers\.\d+\.self_attn\.q_proj")
    with pytest.raises(Refused, match="matches no module of MixtralForCausalLM"):
        adapted("mixtral", absent)
    with pytest.raises(Refused, match="no routed experts"):
        adapted("gemma4-text", EXPERTS)
    towers = LoraPlan(target_modules=r".*\.(q_proj|v_proj)")
    with pytest.raises(Refused, match="frozen component"):
        adapted("gemma4-moe", towers, freeze=("vision_tower",))
    with pytest.raises(Refused, match="lora_dropout=0.1"):
        refuse_dropout(0.1, EXPERTS.target_parameters)
    refuse_dropout(0.1, ())


def test_bypassed_layers_are_left_out_with_a_reason() -> None:
    every = LoraPlan(target_modules=r".*layers\.\d+\.(self_attn\.q_proj|altup\..*coefs)")
    with pytest.warns(UserWarning, match="correction_coefs.*reads its weight directly"):
        model = prepare(checkpoint.build_stock(spec("gemma3n")), make_plan(lora=every))
    names = [n for n, p in model.named_parameters() if "lora_A" in n]
    assert any("prediction_coefs" in n for n in names)
    assert not any("correction_coefs" in n for n in names)
    loss(model, collate(batches.samples(spec("gemma3n"), "text"), make_plan())).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    undo(model)


def test_stock_lora_on_a_bypassed_layer_gets_no_gradient() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["correction_coefs", "q_proj"])
    model: Any = get_peft_model(checkpoint.build_stock(spec("gemma3n")), config).train()  # type: ignore[arg-type]
    loss(model, collate(batches.samples(spec("gemma3n"), "text"), make_plan())).backward()  # type: ignore[no-untyped-call]
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without and all("correction_coefs" in n for n in without)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_adapters_get_the_same_gradients(reentrant: bool) -> None:
    grads = []
    for kwargs in (None, {"use_reentrant": reentrant}):
        model = adapted("mixtral", LORA, checkpointing=kwargs)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(3))
        loss(model, collate(batches.samples(spec("mixtral"), "text"), make_plan())).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        undo(model)
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_adapter_dtype_by_strategy() -> None:
    def dtypes(strategy: str) -> set[torch.dtype]:
        model = checkpoint.build_stock(spec("mixtral"), dtype=torch.bfloat16)
        ready = prepare(model, make_plan(lora=LORA, strategy=strategy, dtype="bfloat16"))
        undo(ready)
        return {p.dtype for n, p in ready.named_parameters() if "lora_" in n}

    assert dtypes("single") == {torch.float32} and dtypes("fsdp2") == {torch.bfloat16}


def test_build_follows_the_config_and_the_plan(tmp_path: Any) -> None:
    path = checkpoint.checkpoint(spec("qwen3_5_moe"))
    model: Any = build(path, make_plan(dtype="float64", attn_implementation="eager"))
    assert type(model).__name__ == spec("qwen3_5_moe").model_class
    assert model.dtype == torch.float64
    config = model.config.get_text_config()
    assert config._experts_implementation == "eager" and config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="cannot be read"):
        build(tmp_path, make_plan())
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    with pytest.raises(ConfigError, match="NoSuchModel"):
        build(tmp_path, make_plan())


def test_build_refuses_missing_and_unexpected_keys(tmp_path: Any) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint.checkpoint(spec("gemma3-text")), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    some = next(key for key in state if "q_proj" in key)
    save_file({k: v for k, v in state.items() if k != some}, file, {"format": "pt"})
    with pytest.raises(Refused, match="missing keys"):
        build(tmp_path / "model", make_plan())
    save_file(state | {"model.extra.weight": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(Refused, match="unexpected keys"):
        build(tmp_path / "model", make_plan())


def test_every_patch_of_a_model_is_listed_in_order() -> None:
    model = checkpoint.build_stock(spec("qwen3_5_moe"))
    found = patches.applicable(model, make_plan())
    assert found == [name for name in patches.NAMES if name in found]
    assert {"delta_net_documents", "packed_rows", "token_weighted_loss"} <= set(found)
