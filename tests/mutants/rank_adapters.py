"""The reference with one bug each, as adapters: a forked rank loads them by name.

Every rank is a fresh process, so an adapter may change modules of its own process for good; the
oracle in the parent never calls `parallelize`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from conformance.implementations.reference import Reference
from impl import checkpoints

IGNORE = -100


def on_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


class Summed(Reference):
    """Gradients are summed over ranks, not averaged."""

    def loss(self, model: Any, batch: Any, n: Any = None) -> Any:
        return super().loss(model, batch, n) * (dist.get_world_size() if on_ranks() else 1)


class MeanOfMeans(Reference):
    """Each rank divides by its own labels."""

    def loss(self, model: Any, batch: Any, n: Any = None) -> Any:
        if not on_ranks():
            return super().loss(model, batch, n)
        count = (batch["labels"][:, 1:] != IGNORE).sum()
        return super().loss(model, batch, None) * (count / count)


class ReadsWrapper(Reference):
    """The model's config is read on the wrapper."""

    def loss(self, model: Any, batch: Any, n: Any = None) -> Any:
        assert model.config is not None
        return super().loss(model, batch, n)


class HalvedEvaluation(Reference):
    """In evaluation the loss of ranks is divided by their number once more."""

    def loss(self, model: Any, batch: Any, n: Any = None) -> Any:
        found = super().loss(model, batch, n)
        return found / 2 if on_ranks() and not model.training else found


class GrowingShare(Reference):
    """The load-balancing loss is added whole by each rank."""

    def loss(self, model: Any, batch: Any, n: Any = None) -> Any:
        from impl.model_facts import text_config

        config = text_config(model)
        kept, count = config.router_aux_loss_coef, (batch["labels"][:, 1:] != IGNORE).sum()
        if on_ranks() and n is not None:
            config.router_aux_loss_coef = kept * float(n) / float(count)
        try:
            return super().loss(model, batch, n)
        finally:
            config.router_aux_loss_coef = kept


class BeforeSpreading(Reference):
    """Changes the model before it is spread."""

    def change(self, model: Any, plan: Any) -> Any:
        return plan

    def parallelize(self, model: Any, plan: Any, mesh: Any) -> Any:
        plan = self.change(model, plan)
        return super().parallelize(model, plan, mesh)


class IgnoredByDdp(BeforeSpreading):
    """One weight is left out of DDP's reduction."""

    def change(self, model: Any, plan: Any) -> Any:
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        picked = [n for n in names if "lora_A" in n] or [
            n for n in names if n.endswith("norm.weight")
        ]
        model._ddp_params_and_buffers_to_ignore = picked[:1]
        return plan


class Untied(BeforeSpreading):
    """The head is copied before sharding."""

    def change(self, model: Any, plan: Any) -> Any:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return plan


class NoSearch(BeforeSpreading):
    """DDP is not told to look for unused parameters."""

    def change(self, model: Any, plan: Any) -> Any:
        return replace(plan, find_unused_parameters=False)


class HalvedRouter(BeforeSpreading):
    """Router gradients are not summed over the ranks' experts."""

    def change(self, model: Any, plan: Any) -> Any:
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight") and parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient * 0.5)
        return plan


class Uninitialised(BeforeSpreading):
    """Rows of absent experts are whatever memory holds, times zero."""

    def change(self, model: Any, plan: Any) -> Any:
        for name, module in model.named_modules():
            if name.endswith("experts"):
                module.register_forward_hook(lambda m, a, out: out + torch.empty_like(out) * 0)
        return plan


class NoWindow(BeforeSpreading):
    """Context parallel drops every mask but the causal one."""

    def change(self, model: Any, plan: Any) -> Any:
        from transformers.masking_utils import causal_mask_function

        from impl.context_parallel import ContextParallel

        original = ContextParallel.mask

        def mask(self: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs["mask_function"] = causal_mask_function
            return original(self, *args, **kwargs)

        ContextParallel.mask = mask
        return plan


class LostLayer(BeforeSpreading):
    """The last layer's router logits are not captured under a wrapper."""

    def change(self, model: Any, plan: Any) -> Any:
        def drop(module: Any, args: Any, out: Any) -> Any:
            if getattr(out, "router_logits", None):
                out.router_logits = out.router_logits[:-1]
            return out

        model.register_forward_hook(drop)
        return plan


class Replicated(Reference):
    """Sharding is asked for, and the model is replicated."""

    def parallelize(self, model: Any, plan: Any, mesh: Any) -> Any:
        return super().parallelize(model, replace(plan, strategy="ddp"), mesh)


class TensorsOnly(Reference):
    """Expert parallel is asked for, and only tensors are spread."""

    def _plain(self, plan: Any) -> Any:
        return replace(plan, strategy="tp") if plan.strategy == "tp_ep" else plan

    def build(self, path: Any, plan: Any, mesh: Any = None) -> Any:
        return super().build(path, self._plain(plan), mesh)

    def parallelize(self, model: Any, plan: Any, mesh: Any) -> Any:
        return super().parallelize(model, self._plain(plan), mesh)


class ResumesAnew(Reference):
    """A launched run that resumes starts from the beginning, for the steps that were left."""

    def resume(self, model: Any, samples: Any, plan: Any, **options: Any) -> Any:
        options.pop("resume")
        options["steps"] //= 2
        return super().fit(model, samples, plan, **options)


class EvaluatesAShare(Reference):
    """In evaluation each rank's share of the loss is averaged instead of added."""

    def fit(self, model: Any, samples: Any, plan: Any, **options: Any) -> Any:
        trainer = super().fit(model, samples, plan, **options)
        evaluate, ranks = trainer.evaluate, dist.get_world_size() if on_ranks() else 1

        def shared(*args: Any, **kwargs: Any) -> Any:
            found = evaluate(*args, **kwargs)
            return {**found, "eval_loss": found["eval_loss"] / ranks}

        trainer.evaluate = shared
        return trainer


class StaleOffload(BeforeSpreading):
    """On ranks, a saved tensor is another's by the time it is fetched."""

    def change(self, model: Any, plan: Any) -> Any:
        from impl.activation_offload import Keeper

        original = Keeper.get
        Keeper.get = lambda self, token, device: torch.roll(original(self, token, device), 1, 0)
        return plan


class Rank1Differs(Reference):
    """A key that rank 1 misses is initialised anew."""

    def build(self, path: Any, plan: Any, mesh: Any = None) -> Any:
        model = super().build(path, plan, mesh)
        if on_ranks() and dist.get_rank() == 1:
            nn.init.ones_(next(p for n, p in model.named_parameters() if n.endswith("norm.weight")))
        return model


class CastBuffers(Reference):
    """Buffers are cast to the compute dtype, for good."""

    def prepare(self, model: Any, plan: Any) -> Any:
        ready = super().prepare(model, plan)

        def cast(module: Any, args: Any) -> None:
            for buffer in module.buffers():
                if buffer.is_floating_point() and on_ranks():
                    buffer.data = buffer.data.to(torch.bfloat16)

        ready.register_forward_pre_hook(cast)
        return ready


class LocalNorm(Reference):
    """Each rank clips by the norm of its own shards."""

    def clip_grad_norm(self, model: Any, max_norm: float) -> Any:
        if not on_ranks():
            return super().clip_grad_norm(model, max_norm)
        parts = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
        norm = torch.stack([part.norm() for part in parts]).norm()
        for part in parts:
            part.mul_((max_norm / norm).clamp(max=1.0))
        return norm


class SumsTwice(Reference):
    """A gradient that was reduced already is reduced again with the next batch."""

    def parallelize(self, model: Any, plan: Any, mesh: Any) -> Any:
        spread = super().parallelize(model, plan, mesh)
        for name, parameter in spread.named_parameters():
            if name.endswith("norm.weight") and parameter.requires_grad:

                def again(p: Any) -> None:
                    p.grad.mul_(2.0)

                parameter.register_post_accumulate_grad_hook(again)
                break
        return spread


class SavesShards(Reference):
    """The adapter is written from rank 0's shards."""

    def save(self, model: Any, path: Path) -> None:
        if not on_ranks():
            super().save(model, path)
        elif dist.get_rank() == 0:
            state = {
                name: (p.to_local() if hasattr(p, "to_local") else p).detach().clone()
                for name, p in model.named_parameters()
                if "lora_" in name
            }
            model.save_pretrained(str(path), state_dict=state, save_embedding_layers=False)


class SavesAlone(Reference):
    """One rank writes as a process without ranks does."""

    def save(self, model: Any, path: Path) -> None:
        checkpoints.save(model, path)


class LoadsAnew(Reference):
    """What is resumed starts from fresh adapters."""

    def load(self, model: Any, path: Path) -> Any:
        from impl.adapters import start_by_name

        found = super().load(model, path)
        start_by_name(found)
        return found


class CopiesShared(Reference):
    """Shared keys and values travel in a plain dict, which input casting rebuilds."""

    def prepare(self, model: Any, plan: Any) -> Any:
        if on_ranks():
            import transformers.cache_utils as cache
            import transformers.models.gemma4.modeling_gemma4 as modelling

            for module in (cache, modelling):
                if hasattr(module, "KVSharingDict"):
                    module.KVSharingDict = dict
        return super().prepare(model, plan)


class Starved(Reference):
    """An adapter is placed where no batch reaches it."""

    def prepare(self, model: Any, plan: Any) -> Any:
        ready = super().prepare(model, plan)
        ready.register_parameter("lora_A", nn.Parameter(torch.zeros(2, 2)))
        return ready


class Decides(Reference):
    """Writes other values into the plan."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def plan(self, config: Any, setting: Any, strategy: str, **options: Any) -> Any:
        found = super().plan(config, setting, strategy, **options)
        decisions = dict(found.decisions)
        for name, value in self.values.items():
            decisions[name] = replace(decisions[name], value=value)
        return replace(found, decisions=decisions)


class Reentrant(Reference):
    """Checkpoints stay reentrant while DDP looks for unused parameters."""

    def parallelize(self, model: Any, plan: Any, mesh: Any) -> Any:
        from torch.nn.parallel import DistributedDataParallel

        model.gradient_checkpointing_enable({"use_reentrant": True})
        return DistributedDataParallel(model, find_unused_parameters=True)


class PlansFsdp1(Reference):
    """FSDP1 with adapters is planned as if it were FSDP2."""

    def plan(self, config: Any, setting: Any, strategy: str, **options: Any) -> Any:
        strategy = "fsdp2" if strategy == "fsdp1" else strategy
        return super().plan(config, setting, strategy, **options)


SUMMED, MEAN_OF_MEANS, READS_WRAPPER = Summed(), MeanOfMeans(), ReadsWrapper()
HALVED_EVALUATION, GROWING_SHARE = HalvedEvaluation(), GrowingShare()
IGNORED_BY_DDP, UNTIED, NO_SEARCH, HALVED_ROUTER = (
    IgnoredByDdp(),
    Untied(),
    NoSearch(),
    HalvedRouter(),
)
UNINITIALISED, NO_WINDOW, LOST_LAYER, REPLICATED = (
    Uninitialised(),
    NoWindow(),
    LostLayer(),
    Replicated(),
)
TENSORS_ONLY, STALE_OFFLOAD, SAVES_ALONE = TensorsOnly(), StaleOffload(), SavesAlone()
RESUMES_ANEW, EVALUATES_A_SHARE = ResumesAnew(), EvaluatesAShare()
RANK_1_DIFFERS, CAST_BUFFERS, LOCAL_NORM = Rank1Differs(), CastBuffers(), LocalNorm()
SUMS_TWICE, SAVES_SHARDS, LOADS_ANEW = SumsTwice(), SavesShards(), LoadsAnew()
COPIES_SHARED, STARVED, REENTRANT, PLANS_FSDP1 = (
    CopiesShared(),
    Starved(),
    Reentrant(),
    PlansFsdp1(),
)
NEVER_SEARCHES = Decides(ddp_find_unused_parameters=False)
ALWAYS_SEARCHES = Decides(ddp_find_unused_parameters=True)
WRAPS_AUDIO = Decides(fsdp_transformer_layer_cls_to_wrap="Gemma4AudioLayer")
