"""Bugs of what is planned and not done, or done and not said: K02 to K06, K19 to K21, O05, R04."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.mutants import mutant
from tests.mutants.mutants_forward import MIXTRAL, around, drop_patch

DELTA = "impl.patches.delta_net_documents"
SOFTMAX = "impl.patches.router_softmax"
HEADS = "impl.kernels.cross_entropy_models"
OFFLOAD = "impl.activation_offload"
PULL = "https://github.com/axolotl-ai-cloud/axolotl/pull"


@mutant("b042", case="K02/qwen3_next/packed/single", issue=f"{PULL}/2840")
def the_packing_patch_is_not_installed(patch: pytest.MonkeyPatch) -> None:
    """Rows are packed, and nothing tells the recurrent layers."""
    drop_patch(patch, "delta_net_documents")


@mutant("b115", case="K02/qwen3_5-text/kernels/single", issue=f"{PULL}/2732")
def the_patch_is_one_layer_off(patch: pytest.MonkeyPatch) -> None:
    """What recurrent layer i needs is put on layer i + 1."""

    def make(original: Any) -> Any:
        def pairs(model: Any) -> Any:
            layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
            for layer, network in original(model):
                at = list(layers).index(layer)
                yield layers[min(at + 1, len(layers) - 1)], network

        return pairs

    around(patch, f"{DELTA}:gated_delta_layers", make)


@mutant("b172", case="K02/gemma4-moe/kernels/single", issue=f"{PULL}/3405")
def a_closure_is_bound_late(patch: pytest.MonkeyPatch) -> None:
    """Every router's replacement calls the router that was patched last."""
    latest: list[Any] = []
    every_router_is_patched(patch)

    def make(original: Any) -> Any:
        def in_float32(router: Any) -> Any:
            latest[:] = [type(router).forward.__get__(router)]
            router.forward = lambda *args: latest[0](*args)
            return lambda: vars(router).pop("forward", None)

        return in_float32

    around(patch, f"{SOFTMAX}:_in_float32", make)


@mutant("b172", case="K02/gemma4-moe/kernels/single", issue=f"{PULL}/3405")
def one_layer_alone_is_patched(patch: pytest.MonkeyPatch) -> None:
    """The loop over the routers ends after the first."""
    every_router_is_patched(patch)
    around(
        patch,
        f"{SOFTMAX}:_routers",
        lambda original: lambda model: iter(list(original(model))[:1]),
    )


def every_router_is_patched(patch: pytest.MonkeyPatch) -> None:
    """As where the installed router takes its softmax in low precision."""
    around(patch, f"{SOFTMAX}:in_low_precision", lambda original: lambda router, config: True)


@mutant("b173", case="K02/qwen3_5-text/kernels/single", issue=f"{PULL}/3212")
def the_patched_name_moved(patch: pytest.MonkeyPatch) -> None:
    """The replacement is stored under the name that the function had in another release."""

    def make(original: Any) -> Any:
        def swap(owner: Any, name: str, replace: Any) -> Any:
            setattr(owner, f"{name}_forward", replace(vars(owner)[name]))
            return lambda: vars(owner).pop(f"{name}_forward", None)

        return swap

    around(patch, f"{DELTA}:swap", make)


@mutant("b114", case="K02/mixtral/kernels/single", issue=f"{PULL}/3806")
def the_fused_loss_is_half_patched(patch: pytest.MonkeyPatch) -> None:
    """The fused loss says that it is on, and the model's own forward makes logits."""

    def make(original: Any) -> Any:
        def enable(model: Any, **options: Any) -> Any:
            enabled = original(model, **options)
            vars(enabled.model).pop("forward")
            return enabled

        return enable

    around(patch, f"{HEADS}:enable", make)


@mutant("b174", case="K02/mixtral/kernels/single", issue="axolotl's CCE fork, a668583")
def another_entry_of_the_registry_runs(patch: pytest.MonkeyPatch) -> None:
    """The plan names one experts implementation and the model gets the next."""
    around(
        patch,
        "impl.prepare:_set_experts",
        lambda original: lambda inner, wanted, state: original(inner, "batched_mm", state),
    )


@mutant("b114", case="K03/qwen3_5-text/packed/single", issue=f"{PULL}/3806")
def the_rule_runs_over_documents(patch: pytest.MonkeyPatch) -> None:
    """The convolution keeps documents apart, the delta rule beside it does not."""

    def make(original: Any) -> Any:
        def replace(stock: Any) -> Any:
            ours = original(stock)

            def rule(*args: Any, document_ids: Any = None, **kwargs: Any) -> Any:
                ids = None if document_ids is None else torch.zeros_like(document_ids)
                return ours(*args, document_ids=ids, **kwargs)

            return functools.wraps(stock)(rule)

        return replace

    around(patch, f"{DELTA}:_rule", make)


@mutant("generic-taps", case="K03/qwen3_next/packed/single", issue="live defect L4")
def the_convolution_reads_backwards(patch: pytest.MonkeyPatch) -> None:
    """The taps of the packed convolution are in reverse order."""

    def make(original: Any) -> Any:
        return lambda x, weight, *rest: original(x, weight.flip(-1), *rest)

    around(patch, "impl.kernels.gated_delta_rule:causal_conv1d", make)


@mutant(
    "b025",
    case="K04/gemma4-moe/bf16/single",
    issue="https://github.com/Dao-AILab/flash-attention/issues/2427",
)
def wide_heads_go_to_flash_attention(patch: pytest.MonkeyPatch) -> None:
    """FlashAttention is accepted for every layer, whatever the width of its heads."""
    patch.setattr("impl.plan_numerics.FLASH_WIDTH", 1 << 20)


@mutant(
    "b075",
    case="K19/mixtral/-/single",
    issue="https://github.com/pytorch/pytorch/issues/193633",
)
def the_second_backward_is_nan(patch: pytest.MonkeyPatch) -> None:
    """A second backward of the grouped product reads what the first has freed."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as registry

    original = registry["grouped_mm"]

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.runs = 0
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            ctx.runs += 1
            return gradient if ctx.runs == 1 else gradient * float("nan")

    def grouped(*args: Any) -> Any:
        return Poisoned.apply(original(*args))

    patch.setitem(registry._global_mapping, "grouped_mm", grouped)


@mutant("generic-compiled", case="K05/mixtral/-/single", issue="kernels.md §3 (torch.compile)")
def compiled_code_is_another(patch: pytest.MonkeyPatch) -> None:
    """What runs when compiled is not what runs otherwise."""

    def make(original: Any) -> Any:
        def forward(self: Any, x: Any) -> Any:
            out = original(self, x)
            return out * 1.01 if torch.compiler.is_compiling() else out

        return forward

    around(patch, f"{MIXTRAL}:MixtralRMSNorm.forward", make)


@mutant("generic-graphs", case="K21/mixtral/kernels/single", issue="kernels.md §3 (torch.compile)")
def a_count_is_compiled_in(patch: pytest.MonkeyPatch) -> None:
    """The compiler guards on how often the loss was fused, and compiles anew when that changes."""
    around(
        patch,
        f"{HEADS}:_Deferred.take",
        lambda original: original._torchdynamo_orig_callable,
    )


@mutant("L20", case="K06/mixtral/kernels/single", issue="live defect L20")
def the_fused_loss_gives_up_silently(patch: pytest.MonkeyPatch) -> None:
    """A loss function of the user's own ends the fused loss without a word."""
    around(patch, f"{HEADS}:Enabled.fall_back", lambda original: lambda self, why: None)


@mutant("L20", case="K06/mixtral/lora-experts+kernels/single", issue="live defect L20")
def two_adapters_are_folded_silently(patch: pytest.MonkeyPatch) -> None:
    """With two active adapters the experts kernel makes way for folded weights without a word."""

    def make(original: Any) -> Any:
        def plain(*args: Any) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return original(*args)

        return plain

    around(patch, "impl.kernels.registration:_plain", make)


@mutant("L20", case="K20/-/kernels/-", issue="live defect L20")
def the_plan_leaves_kernels_out_silently(patch: pytest.MonkeyPatch) -> None:
    """A plan that drops a kernel has no warning of it."""
    around(patch, "impl.plan_draft:Draft.warn", lambda original: lambda self, sentence: None)


@mutant("b155", case="O05/mixtral/offload/single", issue=f"{PULL}/3649")
def the_tracker_is_not_cleared(patch: pytest.MonkeyPatch) -> None:
    """What was offloaded stays in a table when the step is over."""

    def make(original: Any) -> Any:
        def init(self: Any, *args: Any) -> None:
            original(self, *args)
            self._known = {}

        return init

    around(patch, f"{OFFLOAD}:Offloader.__init__", make)


@mutant("b155", case="O05/qwen3_next/offload/single", issue=f"{PULL}/3649")
def an_unused_output_holds_its_node(patch: pytest.MonkeyPatch) -> None:
    """A saved output that no backward asks for is packed as itself, and never freed."""

    def make(original: Any) -> Any:
        def pack(self: Any, tensor: Any) -> Any:
            return original(self, tensor) if self.eligible(tensor) else tensor

        return pack

    around(patch, f"{OFFLOAD}:Offloader.pack", make)


@mutant("b155", case="O05/mixtral/offload-legacy/single", issue=f"{PULL}/3649")
def the_device_keeps_what_was_offloaded(patch: pytest.MonkeyPatch) -> None:
    """The tensor is copied to the host and kept beside the copy."""

    def make(original: Any) -> Any:
        def init(self: Any, tensor: Any, keeper: Any) -> None:
            original(self, tensor, keeper)
            self.kept = tensor.detach()

        return init

    around(patch, f"{OFFLOAD}:Stash.__init__", make)


@mutant(
    "b072",
    case="R04/gemma4-moe/-/single",
    issue="https://github.com/unslothai/unsloth/pull/4812",
)
def the_router_is_of_another_class(patch: pytest.MonkeyPatch) -> None:
    """A rewritten router is no instance of the class whose output is recorded."""

    def make(original: Any) -> Any:
        def prepare(model: Any, plan: Any) -> Any:
            ready = original(model, plan)
            for module in ready.modules():
                kind = type(module)
                if kind.__name__.endswith("Router"):
                    body = {k: v for k, v in vars(kind).items() if k not in ("__dict__",)}
                    module.__class__ = type(kind.__name__, (nn.Module,), body)
            return ready

        return prepare

    around(patch, "impl.prepare:prepare", make)


@mutant(
    "generic-history",
    case="R04/mixtral/ckpt-reentrant/single",
    issue="https://pytorch.org/docs/stable/checkpoint.html",
)
def router_logits_have_no_history(patch: pytest.MonkeyPatch) -> None:
    """Reentrant checkpoints record router logits without a graph: their loss trains nothing."""
    around(
        patch,
        "impl.plan_checkpointing:takes_auxiliary_loss",
        lambda original: lambda draft: False,
    )
