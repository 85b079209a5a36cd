"""What is detected from a config and decided automatically, and that it takes effect."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from conformance import checkpoint
from conformance.case import Case
from conformance.check import check
from conformance.fidelity import differences, fixture_faults, published_config
from conformance.lora import adapters, decoder_projections
from conformance.numerics import assert_close_step
from conformance.subject import Subject, remember
from conformance.tolerances import tolerance

Measured = dict[str, float]
WRAPPER = "_checkpoint_wrapped_module"


@check("X09", needs=("plan", "build"))
def test_auto_class(case: Case, subject: Subject) -> None:
    """The class that the auto class gives for a config is the one that is built and planned for.

    families.md §6: a gemma4 config through AutoModelForCausalLM gives the multimodal class
    """
    import transformers

    path = checkpoint.checkpoint(subject.model_spec, "float32")
    config = transformers.AutoConfig.from_pretrained(path)
    built = type(subject.built(subject.plan(), case.setting)).__name__
    wanted = subject.model_spec.model_class
    assert config.architectures == [wanted], (
        f"{case.id}: the checkpoint says {config.architectures}"
    )
    assert built == wanted, f"{case.id}: {built} was built, the checkpoint is a {wanted}"


@check("X10", needs=("plan",), settings=("lora",))
def test_lora_pattern_survives_wrappers(case: Case, subject: Subject, measured: Measured) -> None:
    """A LoRA pattern matches the same decoder modules with and without checkpoint wrappers.

    https://docs.axolotl.ai/docs/agents/model_architectures.html
    """
    pattern = subject.plan().decisions["lora_target_modules"].value
    assert isinstance(pattern, str), f"{case.id}: the targets are no pattern but {pattern!r}"
    names = sorted(decoder_projections(subject.stock("float32"), subject.model_spec))
    matched = [name for name in names if re.fullmatch(pattern, name)]
    measured["matched"] = len(matched)
    assert matched, f"{case.id}: {pattern!r} matches no projection, such as {names[0]}"
    assert matched == names, f"{case.id}: not matched: {sorted(set(names) - set(matched))[0]}"
    layer = re.compile(rf"^({re.escape(subject.model_spec.layers)}\.\d+)\.")
    wrapped = [layer.sub(rf"\1.{WRAPPER}.", name) for name in matched]
    lost = [name for name in wrapped if not re.fullmatch(pattern, name)]
    assert not lost, f"{case.id}: under checkpoint wrappers {len(lost)} are lost, such as {lost[0]}"


@check("X06", needs=("plan",), strategies=("fsdp2",), marks=("issues",))
def test_wrap_classes_are_there(case: Case, subject: Subject, measured: Measured) -> None:
    """Every class that the plan wraps for FSDP is in the model, and the decoder layers are wrapped.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3584
    """
    fsdp = subject.plan().decisions["fsdp_config"].value
    named = fsdp["fsdp_transformer_layer_cls_to_wrap"]
    names = {named} if isinstance(named, str) else set(named)
    names = {part for name in names for part in name.split(",")}
    present = {type(module).__name__ for module in subject.stock("float32").modules()}
    measured["wrapped"] = len(names)
    assert names <= present, f"{case.id}: not in the model: {sorted(names - present)}"
    assert subject.model_spec.wrap_class in names, (
        f"{case.id}: wraps {names}, not the decoder layer"
    )


@check("X08", needs=("plan",), settings=("ckpt-reentrant", "lora+ckpt-reentrant"))
def test_reentrant_is_not_planned_for_shared_kv(case: Case, subject: Subject) -> None:
    """Reentrant checkpointing is not planned where keys and values are shared, and that is said.

    https://github.com/unslothai/unsloth-zoo/pull/813
    """
    plan = subject.plan()
    kwargs = plan.decisions["gradient_checkpointing_kwargs"].value
    assert plan.decisions["gradient_checkpointing"].value, f"{case.id}: checkpointing was dropped"
    if "kv_sharing" not in subject.model_spec.traits:
        return
    assert kwargs == {"use_reentrant": False}, f"{case.id}: plans {kwargs} with shared keys/values"
    said = [text for text in plan.warnings if "reentrant" in text]
    assert said, f"{case.id}: reentrant was asked for and replaced without a word"


@check("X13", needs=("plan",), settings=("-", "lora"), strategies=("ddp",), traits=("vision",))
def test_unfed_towers_are_planned_for(case: Case, subject: Subject) -> None:
    """Text training of a multimodal model freezes its towers or looks for unused parameters.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3584
    """
    plan = subject.plan()
    frozen = plan.decisions["freeze_mm_modules"].value
    unused = plan.decisions["ddp_find_unused_parameters"].value
    assert frozen or unused, f"{case.id}: towers are neither frozen nor looked for"
    for name in ("freeze_mm_modules", "ddp_find_unused_parameters"):
        assert plan.decisions[name].reason.strip(), f"{case.id}: {name} has no reason"


@check("X11", needs=(), correctness=False)
def test_tiny_is_faithful(case: Case, subject: Subject) -> None:
    """The tiny config differs from the published one only in the fixed list of size fields.

    families.md §11, trap (i): tiny models of the hub are not always faithful
    """
    spec = subject.model_spec
    found = differences(checkpoint.build_config(spec), published_config(spec))
    assert not found, f"{case.id}: beyond sizes it differs in {found}"


@check("X12", needs=(), correctness=False)
def test_tiny_obeys_the_fixture_rules(case: Case, subject: Subject) -> None:
    """The tiny model makes every defect visible: distinct widths, two of each layer, long rows.

    families.md §11, fixture rules
    """
    faults = fixture_faults(subject.model_spec)
    assert not faults, f"{case.id}: {'; '.join(faults)}"


@check(
    "X07",
    needs=("prepare", "loss"),
    varies=("tuning", "checkpointing", "offload"),
    pairs_over="all",
)
def test_requested_features_take_effect(case: Case, subject: Subject, measured: Measured) -> None:
    """What a setting asks for is seen to happen: adapters, recomputation, offloading, no logits.

    https://github.com/axolotl-ai-cloud/axolotl/pull/3733
    """
    model = subject.model()
    seen = watch(model, subject)
    bare = case.setting.but(checkpointing="off", offload="off", kernels="off")
    plain = remember(
        ("X07", subject.name, subject.model_spec.name, bare, subject.device),
        lambda: watch(subject.model(bare), subject),
    )
    measured.update(seen)
    setting = case.setting
    assert bool(adapters(model)) == (setting.tuning != "full"), f"{case.id}: adapters"
    again = seen["layer runs"] / seen["layers"]
    checkpointed = setting.checkpointing != "off"
    assert (again > 1.5) == checkpointed, f"{case.id}: each layer ran {again:.2g} times"
    if setting.offload != "off":
        assert seen["packed outside"] < plain["packed outside"], (
            f"{case.id}: no saved tensor was offloaded ({seen['packed outside']:g} of"
            f" {plain['packed outside']:g} went the ordinary way)"
        )
    assert plain["head runs"] > 0, f"{case.id}: without kernels the head did not run"
    if setting.kernels == "on":
        assert seen["head runs"] == 0, f"{case.id}: logits were made in spite of the fused loss"


def watch(model: nn.Module, subject: Subject) -> dict[str, float]:
    """One step, watched: how often decoder layers and the head ran, and how many saved tensors
    went past hooks set outside the model (an offloader's own hooks take theirs)."""
    counts = {"layer runs": 0.0, "head runs": 0.0, "packed outside": 0.0, "layers": 0.0}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        counts["packed outside"] += 1
        return tensor

    def counter(name: str) -> Any:
        def count(*_: Any) -> None:
            counts[name] += 1

        return count

    for name, module in model.named_modules():
        if name.endswith("post_attention_layernorm") and subject.model_spec.layers.split(".")[
            -2
        ] in name.split("."):
            module.register_forward_pre_hook(counter("layer runs"))
            counts["layers"] += 1
        elif name.endswith(("lm_head", "lm_head.base_layer")):
            module.register_forward_pre_hook(counter("head runs"))
    batch = subject.batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = subject.loss(model, batch)
    loss.backward()
    return counts


@check(
    "N01",
    needs=("prepare", "loss", "collate"),
    varies=("tuning", "checkpointing", "batch", "offload", "kernels"),
)
def test_setting_keeps_the_gradients(case: Case, subject: Subject, measured: Measured) -> None:
    """Checkpointing, offloading and kernels change neither the loss nor any gradient.

    The covering array over settings; each pair of them was once a defect of its own (bugs.md)
    """
    plain = subject.plain_step(checkpointing="off", offload="off", kernels="off")
    got = subject.step(subject.model(), subject.batch())
    assert any(g.any() for g in plain.gradients.values()), f"{case.id}: the oracle has no gradient"
    limit = tolerance("gradients/settings", subject.numerics)
    assert_close_step(case.id, got, plain, limit, measured)
