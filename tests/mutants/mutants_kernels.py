"""Bugs of the experts kernel and of the linear cross-entropy: K01, K07 to K17."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.mutants import mutant
from tests.mutants.mutants_forward import around

EXPERTS = "impl.kernels.experts_torch"
HEAD = "impl.kernels.cross_entropy"
ROWS = "impl.kernels.cross_entropy_torch"


def gradient_tile(patch: pytest.MonkeyPatch, change: Any) -> None:
    """Every tile of dlogits that the head writes, through `change`."""

    def make(original: Any) -> Any:
        def written(self: Any, tile: Any, *args: Any, **options: Any) -> None:
            original(self, tile, *args, **options)
            if options.get("write", True):
                tile.x.copy_(change(tile.x))

        return written

    around(patch, f"{ROWS}:TorchRows.gradient", make)
    around(patch, f"{ROWS}:TorchRows.sweep", make)


@mutant(
    "b170",
    case="K01/-/-/-",
    issue="https://github.com/apple/ml-cross-entropy/issues/48",
)
def the_softcap_is_ignored(patch: pytest.MonkeyPatch) -> None:
    """Logits are not capped."""
    around(
        patch,
        f"{HEAD}:Form",
        lambda original: lambda vocabulary, softcap, *rest: original(vocabulary, None, *rest),
    )


@mutant("b175", case="K01/-/-/-", issue="live defect L16")
def the_bias_is_counted_twice(patch: pytest.MonkeyPatch) -> None:
    """The bias is added once for every block of the hidden width."""

    def make(original: Any) -> Any:
        def logits(tile: Any, dtype: torch.dtype) -> Any:
            bias = None if tile.bias is None else 2 * tile.bias
            return original(replace(tile, bias=bias), dtype)

        return logits

    around(patch, f"{ROWS}:_logits", make)


@mutant("b083", case="K07/-/-/-", issue="live defect L15")
def the_kernel_takes_another_activation(patch: pytest.MonkeyPatch) -> None:
    """silu where the model has tanh-gelu."""
    around(
        patch,
        f"{EXPERTS}:gate_and_slope",
        lambda original: lambda gate, act: original(gate, "silu"),
    )


@mutant("b082", case="K07/-/-/-", issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3830")
def a_sentinel_is_the_last_expert(patch: pytest.MonkeyPatch) -> None:
    """Slots that another rank serves run through the last local expert."""

    def make(original: Any) -> Any:
        def groups(problem: Any) -> Any:
            index = problem.index.clamp(max=problem.experts - 1)
            return original(type(problem)(**{**vars(problem), "index": index}))

        return groups

    around(patch, f"{EXPERTS}:_groups", make)


@mutant("b176", case="K08/-/-/-", issue="live defect L17")
def small_gradients_are_filtered(patch: pytest.MonkeyPatch) -> None:
    """Entries of dlogits below a threshold are skipped, all of them on a flat softmax."""
    around(patch, f"{HEAD}:can_defer", lambda original: lambda op, needs: False)
    gradient_tile(patch, lambda x: torch.where(x.abs() < 2.0**-12, 0.0, x))


@mutant("b159", case="K09/-/-/-", issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3800")
def a_saved_tensor_is_overwritten(patch: pytest.MonkeyPatch) -> None:
    """The backward writes into what the forward saved; a second one reads that."""

    def make(original: Any) -> Any:
        def backward(problem: Any, saved: Any, grad: Any, needs: Any) -> Any:
            found = original(problem, saved, grad, needs)
            saved[0].data.mul_(0.5)
            return found

        return backward

    around(patch, f"{EXPERTS}:backward", make)


@mutant("generic-zero", case="K10/-/-/-", issue="bugs.md §13 (scaling)")
def a_scaling_of_zero_means_the_default(patch: pytest.MonkeyPatch) -> None:
    """Scaling 0 is taken for none given."""

    def make(original: Any) -> Any:
        return lambda x, weight, a, b, scale: original(x, weight, a, b, scale or 1.0)

    around(patch, f"{EXPERTS}:_linear", make)


@mutant("generic-rank-major", case="K11/-/-/-", issue="bugs.md §13 (lora_B expert-major)")
def lora_b_is_read_expert_by_expert(patch: pytest.MonkeyPatch) -> None:
    """lora_B of the experts is read expert-major."""

    def make(original: Any) -> Any:
        def factor(b: Any, expert: int, problem: Any) -> Any:
            if b is None:
                return None
            return b.view(b.shape[0], problem.experts, -1)[:, expert].to(problem.dtype)

        return factor

    around(patch, f"{EXPERTS}:_factor_b", make)


@mutant("generic-tail", case="K17/-/-/-", issue="kernels.md §7.3 (half-width last tiles)")
def a_last_tile_is_left_out(patch: pytest.MonkeyPatch) -> None:
    """Columns beyond the last whole tile of 128 are dropped where there is one."""

    def make(original: Any) -> Any:
        def linear(x: Any, weight: Any, a: Any, b: Any, scale: float) -> Any:
            out, *rest = original(x, weight, a, b, scale)
            whole = out.shape[-1] // 128 * 128
            if whole:
                out[..., whole:] = 0
            return (out, *rest)

        return linear

    around(patch, f"{EXPERTS}:_linear", make)


@mutant("L23", case="K12/-/-/-", issue="live defect L23")
def weights_are_assumed_frozen(patch: pytest.MonkeyPatch) -> None:
    """Expert weights that train get a gradient of zeros."""

    def make(original: Any) -> Any:
        def backward(*args: Any) -> Any:
            found = original(*args)
            for gradient in (found.gate_up, found.down):
                if gradient is not None:
                    gradient.zero_()
            return found

        return backward

    around(patch, f"{EXPERTS}:backward", make)


@mutant("generic-upstream", case="K13/-/-/-", issue="kernels.md §4 (unknown upstream gradient)")
def every_token_has_the_same_upstream(patch: pytest.MonkeyPatch) -> None:
    """Unreduced losses: the gradient takes the mean of what flows in."""

    def make(original: Any) -> Any:
        return lambda ctx, upstream: original(ctx, upstream.mean().expand_as(upstream))

    around(patch, f"{HEAD}:_recompute", make)


@mutant("b061", case="K14/-/-/-", issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3033")
def no_label_is_zero_over_zero(patch: pytest.MonkeyPatch) -> None:
    """Without a label the gradients are 0/0."""

    def make(original: Any) -> Any:
        def nothing(op: Any, needs: Any) -> Any:
            losses, lse, gradients = original(op, needs)
            for name, value in vars(gradients).items():
                setattr(gradients, name, None if value is None else value / value)
            return losses, lse, gradients

        return nothing

    around(patch, f"{HEAD}:_nothing", make)


@mutant("generic-truncation", case="K15/-/-/-", issue="kernels.md §4 (row sums)")
def the_label_is_taken_off_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """dlogits are rounded before the product, so that a row no longer sums to zero."""
    gradient_tile(patch, lambda x: x.bfloat16().to(x.dtype))


@mutant("b159", case="K16/-/-/-", issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3800")
def the_saved_gradient_is_scaled_in_place(patch: pytest.MonkeyPatch) -> None:
    """A second backward scales once more what the first has scaled."""

    def make(original: Any) -> Any:
        return lambda gradient, upstream, keep: gradient.data.mul_(upstream)

    around(patch, f"{HEAD}:scaled", make)
