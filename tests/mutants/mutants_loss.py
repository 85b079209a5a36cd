"""Bugs of the loss, of accumulation and of experts: L01 to L10, R01 to R09."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from tests.mutants import mutant
from tests.mutants.mutants_forward import MIXTRAL, around


@mutant(
    "generic-shift",
    case="L01/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/45354",
)
def labels_are_shifted_twice(patch: pytest.MonkeyPatch) -> None:
    """Each token is trained to predict the one after the next."""

    def make(original: Any) -> Any:
        def shifted(labels: Any, shift_labels: Any) -> Any:
            return original(original(labels, shift_labels), None)

        return shifted

    around(patch, "impl.loss:shifted", make)


@mutant(
    "generic-flat-shift",
    case="L10/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/45354",
)
def labels_are_shifted_across_rows(patch: pytest.MonkeyPatch) -> None:
    """The last token of a row is trained to predict the first of the next."""

    def make(original: Any) -> Any:
        def shifted(labels: Any, shift_labels: Any) -> Any:
            if labels is None or shift_labels is not None:
                return original(labels, shift_labels)
            flat = torch.nn.functional.pad(labels.flatten()[1:], (0, 1), value=-100)
            return flat.view_as(labels)

        return shifted

    around(patch, "impl.loss:shifted", make)


@mutant(
    "b061",
    case="L06/mixtral/-/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3033",
)
def the_mean_of_nothing(patch: pytest.MonkeyPatch) -> None:
    """Without a label the loss is 0/0."""

    def make(original: Any) -> Any:
        def denominator(items: Any, count: Any, like: Any) -> Any:
            return torch.as_tensor(count if items is None else items).to(like)

        return denominator

    around(patch, "impl.loss:denominator", make)


@mutant(
    "b055",
    case="L07/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/37766",
)
def a_tensor_count_is_not_read(patch: pytest.MonkeyPatch) -> None:
    """A count given as a tensor is replaced by the micro-batch's own."""

    def make(original: Any) -> Any:
        def denominator(items: Any, count: Any, like: Any) -> Any:
            return original(None if torch.is_tensor(items) else items, count, like)

        return denominator

    around(patch, "impl.loss:denominator", make)


@mutant(
    "b070",
    case="R01/mixtral/-/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3651",
)
def the_router_takes_a_sigmoid(patch: pytest.MonkeyPatch) -> None:
    """Routing weights are sigmoids instead of a softmax."""

    def make(original: Any) -> Any:
        def forward(self: Any, hidden: Any) -> Any:
            logits, _, indices = original(self, hidden)
            weights = torch.sigmoid(logits).gather(-1, indices)
            return logits, weights / weights.sum(-1, keepdim=True), indices

        return forward

    around(patch, f"{MIXTRAL}:MixtralTopKRouter.forward", make)


@mutant("generic-per-expert-scale", case="R01/gemma4-moe/-/single", issue="bugs.md §13")
def the_per_expert_scale_is_left_out(patch: pytest.MonkeyPatch) -> None:
    """Gemma 4's routing weights sum to one."""

    def make(original: Any) -> Any:
        def forward(self: Any, hidden: Any) -> Any:
            scores, weights, indices = original(self, hidden)
            return scores, weights / self.per_expert_scale[indices], indices

        return forward

    around(patch, "transformers.models.gemma4.modeling_gemma4:Gemma4TextRouter.forward", make)


@mutant(
    "generic-auxiliary",
    case="R02/mixtral/padded/single",
    issue="https://github.com/huggingface/transformers/pull/44242",
)
def padding_counts_in_the_balance(patch: pytest.MonkeyPatch) -> None:
    """The balance loss is taken over padded tokens too."""

    def make(original: Any) -> Any:
        return lambda logits, experts, top_k, mask=None: original(logits, experts, top_k, None)

    around(patch, f"{MIXTRAL}:load_balancing_loss_func", make)


@mutant(
    "b071",
    case="R03/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/44242",
)
def the_auxiliary_flag_is_ignored(patch: pytest.MonkeyPatch) -> None:
    """The coefficient is set and nothing is added."""
    around(patch, "impl.loss:_auxiliary", lambda original: lambda model, outputs: None)


@mutant(
    "b065", case="R05/mixtral/-/single", issue="https://github.com/NVIDIA/Megatron-LM/pull/3672"
)
def the_auxiliary_share_grows(patch: pytest.MonkeyPatch) -> None:
    """Each micro-batch adds the whole auxiliary loss."""

    def make(original: Any) -> Any:
        def loss(model: Any, batch: Any, n: Any = None, **options: Any) -> Any:
            count = (batch["labels"][:, 1:] != -100).sum()
            scale = 1.0 if n is None else float(n) / float(count)
            config = model.config
            kept = config.router_aux_loss_coef
            config.router_aux_loss_coef = kept * scale
            try:
                return original(model, batch, n, **options)
            finally:
                config.router_aux_loss_coef = kept

        return loss

    around(patch, "impl.loss:loss", make)


def experts_changed(patch: pytest.MonkeyPatch, name: str, make: Any) -> None:
    """One experts function of transformers' registry, replaced by `make(original)`."""
    functions = import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    patch.setitem(functions._global_mapping, name, make(functions[name]))


@mutant("b083", case="R06/gemma4-moe/-/single", issue="live defect L15")
def another_activation_in_one_kernel(patch: pytest.MonkeyPatch) -> None:
    """One experts implementation takes silu where the model has gelu."""

    def make(original: Any) -> Any:
        def fn(self: Any, *args: Any) -> Any:
            kept, self.act_fn = self.act_fn, torch.nn.SiLU()
            try:
                return original(self, *args)
            finally:
                self.act_fn = kept

        return fn

    experts_changed(patch, "batched_mm", make)


@mutant(
    "b081",
    case="R07/mixtral/-/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3781",
)
def an_empty_expert_divides_by_zero(patch: pytest.MonkeyPatch) -> None:
    """The gradient of an expert without tokens is NaN."""

    class Divide(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Any) -> Any:
            return weight.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            size = gradient.abs().amax((1, 2), keepdim=True)
            return gradient * (size / size)

    def make(original: Any) -> Any:
        def fn(self: Any, *args: Any) -> Any:
            kept = self._parameters.pop("gate_up_proj")
            self.gate_up_proj = Divide.apply(kept)  # type: ignore[no-untyped-call]
            try:
                return original(self, *args)
            finally:
                del self.gate_up_proj
                self._parameters["gate_up_proj"] = kept

        return fn

    for name in ("grouped_mm", "batched_mm"):
        experts_changed(patch, name, make)


@mutant(
    "generic-dropped-tokens",
    case="R08/mixtral/bf16/single",
    issue="bugs.md §13 (one expert's tokens dropped)",
)
def experts_lose_precision(patch: pytest.MonkeyPatch) -> None:
    """Experts add up their outputs in eight bits."""

    def make(original: Any) -> Any:
        def fn(self: Any, *args: Any) -> Any:
            out = original(self, *args)
            return out.to(torch.float8_e4m3fn).to(out.dtype)

        return fn

    for name in ("grouped_mm", "batched_mm"):
        experts_changed(patch, name, make)


@mutant(
    "b052",
    case="L02/mixtral/fp64/single",
    issue="https://github.com/axolotl-ai-cloud/axolotl/pull/3591",
)
def accumulation_is_a_mean_of_means(patch: pytest.MonkeyPatch) -> None:
    """Micro-batches weigh alike, whatever their number of labels."""

    def make(original: Any) -> Any:
        def loss(model: Any, batch: Any, n: Any = None, **options: Any) -> Any:
            return original(model, batch, None, **options) / 4

        return loss

    around(patch, "impl.fit:loss", make)


@mutant(
    "b054",
    case="L03/mixtral/fp64/single",
    issue="https://github.com/huggingface/transformers/issues/35207",
)
def the_last_window_keeps_the_first_count(patch: pytest.MonkeyPatch) -> None:
    """A shorter window is divided by the number of tokens of a full one."""
    seen: list[Any] = []

    def make(original: Any) -> Any:
        def count(self: Any, batches: Any, device: Any) -> Any:
            seen.append(original(self, batches, device))
            return seen[0]

        return count

    around(patch, "impl.fit:TokenWeightedTrainer._get_num_items_in_batch", make)


@mutant(
    "b055",
    case="L08/mixtral/fp64/single",
    issue="https://github.com/huggingface/transformers/issues/37766",
)
def smoothing_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Label smoothing is asked for and not applied."""

    def make(original: Any) -> Any:
        return lambda model, batch, n=None, **options: original(model, batch, n)

    around(patch, "impl.fit:loss", make)


@mutant(
    "b164",
    case="R09/mixtral/-/single",
    issue="https://github.com/huggingface/transformers/issues/46265",
)
def gate_and_up_change_places(patch: pytest.MonkeyPatch) -> None:
    """Stacked experts hold the up rows first."""

    def make(original: Any) -> Any:
        def build(*args: Any, **options: Any) -> Any:
            model = original(*args, **options)
            for name, parameter in model.named_parameters():
                if name.endswith("gate_up_proj"):
                    parameter.data = parameter.data.roll(parameter.shape[1] // 2, 1)
            return model

        return build

    around(patch, "impl.build:build", make)
