"""Bugs of the forward pass: M01 to M09."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from tests.mutants import mutant

MIXTRAL = "transformers.models.mixtral.modeling_mixtral"


def around(patch: pytest.MonkeyPatch, target: str, make: Callable[..., Any]) -> None:
    """Replace `module:Class.method` (or `module:function`) by `make(original)`."""
    module, _, path = target.partition(":")
    owner: Any = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    patch.setattr(owner, name, make(getattr(owner, name)))


@mutant(
    "b050",
    case="M01/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/37197",
)
def loss_is_summed(patch: pytest.MonkeyPatch) -> None:
    """The loss is a sum over the batch, an order above ln V."""
    around(patch, "impl.loss:denominator", lambda original: lambda *a: original(*a) * 0 + 1)


@mutant("generic-dropout", case="M02/mixtral/-/single", issue="bugs.md §13 (dropout active)")
def dropout_is_active(patch: pytest.MonkeyPatch) -> None:
    """Two runs of one step differ."""

    def make(original: Any) -> Any:
        return lambda self, x: torch.nn.functional.dropout(original(self, x), 0.1)

    around(patch, f"{MIXTRAL}:MixtralRMSNorm.forward", make)


@mutant("L12", case="M03/gemma3n/-/single", issue="live defect L12")
def embeddings_lose_the_per_layer_inputs(patch: pytest.MonkeyPatch) -> None:
    """A forward from `inputs_embeds` differs from the one from ids."""
    drop_patch(patch, "embeds_without_per_layer_inputs")


def drop_patch(patch: pytest.MonkeyPatch, name: str) -> None:
    """The reference without one of its patches."""
    patches = import_module("impl.patches")
    assert name in patches.NAMES
    patch.setattr(patches, "NAMES", tuple(n for n in patches.NAMES if n != name))


@mutant(
    "b001",
    case="M04/gemma4-e2b/-/single",
    issue="https://github.com/huggingface/transformers/issues/45242",
)
def consumers_need_the_cache(patch: pytest.MonkeyPatch) -> None:
    """Without a cache, layers that share keys and values read others."""

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            shared = kwargs.get("shared_kv_states")
            if self.is_kv_shared_layer and kwargs.get("past_key_values") is None and shared:
                key, value = shared[self.layer_type]
                shared[self.layer_type] = (key * 0.5, value)
            return original(self, *args, **kwargs)

        return forward

    around(patch, "transformers.models.gemma4.modeling_gemma4:Gemma4TextAttention.forward", make)


@mutant("L1", case="M05/gemma4-e2b/ckpt-reentrant/single", issue="live defect L1 (b003)")
def reentrant_detaches_shared_keys(patch: pytest.MonkeyPatch) -> None:
    """The loss is right and the gradients of shared keys and values are not."""
    drop_patch(patch, "reentrant_shared_kv")
    around(
        patch,
        "transformers.modeling_utils:checkpoint",
        lambda original: lambda *a, **k: original(*a, **{**k, "use_reentrant": True}),
    )


@mutant(
    "b150",
    case="M06/mixtral/ckpt-nonreentrant/single",
    issue="https://github.com/huggingface/transformers/issues/36040",
)
def cache_is_kept_while_recomputing(patch: pytest.MonkeyPatch) -> None:
    """The cache holds every key twice after the backward pass."""
    layer = import_module(MIXTRAL).MixtralDecoderLayer
    patch.setattr(layer, "_can_checkpoint_with_cache", True)

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, **kwargs)

        return forward

    around(patch, f"{MIXTRAL}:MixtralAttention.forward", make)


@mutant(
    "b008", case="M07/mixtral/-/single", issue="https://github.com/ml-explore/mlx-lm/issues/1674"
)
def decoding_starts_at_zero_again(patch: pytest.MonkeyPatch) -> None:
    """Each decoded token is rotated as if it were the first."""

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("past_key_values") is not None:
                ids = kwargs["input_ids"]
                kwargs["position_ids"] = torch.arange(ids.shape[1])[None]
            return original(self, *args, **kwargs)

        return forward

    around(patch, f"{MIXTRAL}:MixtralModel.forward", make)


@mutant("b063", case="M08/mixtral/-/single", issue="Liger-Kernel 6fe46812")
def the_first_logits_are_kept(patch: pytest.MonkeyPatch) -> None:
    """`logits_to_keep` cuts at the wrong end."""

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            keep = kwargs.pop("logits_to_keep", 0)
            out = original(self, *args, **kwargs)
            if isinstance(keep, int) and keep:
                out.logits = out.logits[:, :keep]
            return out

        return forward

    around(patch, f"{MIXTRAL}:MixtralForCausalLM.forward", make)


@mutant("L26", case="M09/mixtral/-/single", issue="live defect L26")
def one_slot_for_all_calls(patch: pytest.MonkeyPatch) -> None:
    """A batch reads what the batch before it left in a global slot."""
    slot: list[torch.Tensor] = []

    def make(original: Any) -> Any:
        def forward(self: Any, x: torch.Tensor) -> Any:
            out = original(self, x)
            if slot and slot[0].numel() != out[0].numel():
                out = out + 0.01 * slot[0].mean()
            slot[:] = [out[0].detach()]
            return out

        return forward

    around(patch, f"{MIXTRAL}:MixtralRMSNorm.forward", make)
