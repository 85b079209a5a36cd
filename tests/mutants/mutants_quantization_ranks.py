"""Bugs of 4-bit weights on ranks: Q05 to Q09; each an adapter that forked ranks load by name."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from conformance.implementations.reference import Reference
from tests.mutants import mutant
from tests.mutants.rank_adapters import BeforeSpreading, Replicated, on_ranks

HERE = "tests.mutants.mutants_quantization_ranks"


class ScalesDrift(BeforeSpreading):
    """Sharding loses the last digits of the scales of packed expert weights."""

    def change(self, model: Any, plan: Any) -> Any:
        for name, buffer in model.named_buffers():
            if name.endswith("absmax"):
                buffer.mul_(1.01)
        return plan


class HalvesExperts(BeforeSpreading):
    """Gradients of adapters on packed experts are averaged twice."""

    def change(self, model: Any, plan: Any) -> Any:
        for name, parameter in model.named_parameters():
            if "experts" in name and "lora_B" in name:
                parameter.register_hook(lambda gradient: gradient * 0.5)
        return plan


class SavesHalf(Reference):
    """On ranks an adapter over packed weights is written before its last reduction."""

    def save(self, model: Any, path: Path) -> None:
        super().save(model, path)
        file = path / "adapter_model.safetensors"
        if on_ranks() and _first():
            from safetensors.torch import load_file, save_file

            save_file({name: t * 0.5 for name, t in load_file(file).items()}, file)


def _first() -> bool:
    import torch.distributed as dist

    dist.barrier()
    return dist.get_rank() == 0


class PlansAll(Reference):
    """4-bit weights are planned under every strategy."""

    def plan(self, config: Any, setting: Any, strategy: str, **options: Any) -> Any:
        cut = import_module("impl.plan_draft").SHARDED_WHILE_LOADING
        if setting.tuning != "qlora" or strategy not in cut:
            return super().plan(config, setting, strategy, **options)
        found = super().plan(config, setting, "fsdp2", **options)
        return replace(found, strategy=strategy)


SCALES_DRIFT, HALVES_EXPERTS, SAVES_HALF = ScalesDrift(), HalvesExperts(), SavesHalf()
PLANS_ALL, REPLICATED = PlansAll(), Replicated()


@mutant(
    "b-3374",
    case="Q05/gemma4-moe/qlora/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/issues/3374",
    implementation=f"{HERE}:SCALES_DRIFT",
)
def scales_of_ranks_are_off(patch: pytest.MonkeyPatch) -> None:
    """Ranks expand packed experts to other values than one process."""


@mutant(
    "b-1849-ranks",
    case="Q06/gemma4-moe/qlora/fsdp2",
    issue="https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849",
    implementation=f"{HERE}:REPLICATED",
)
def packed_weights_are_not_sharded(patch: pytest.MonkeyPatch) -> None:
    """Each rank holds all packed bytes."""


@mutant(
    "b-3771-ranks",
    case="Q07/gemma4-moe/qlora/ddp",
    issue="https://github.com/axolotl-ai-cloud/axolotl/issues/3771",
    implementation=f"{HERE}:SAVES_HALF",
)
def ranks_save_half(patch: pytest.MonkeyPatch) -> None:
    """What comes back is not what was trained."""


@mutant(
    "b-39648-packed",
    case="Q08/gemma4-moe/qlora/tp",
    issue="https://github.com/huggingface/transformers/issues/39648",
    implementation=f"{HERE}:PLANS_ALL",
)
def packed_weights_are_planned_to_be_cut(patch: pytest.MonkeyPatch) -> None:
    """The plan promises what fails once the ranks have started."""


@mutant(
    "b-3083-packed",
    case="Q09/gemma4-moe/qlora/ddp",
    issue="https://github.com/huggingface/peft/pull/3083",
    implementation=f"{HERE}:HALVES_EXPERTS",
)
def experts_learn_half(patch: pytest.MonkeyPatch) -> None:
    """Adapters on experts get half of their gradient on ranks."""
