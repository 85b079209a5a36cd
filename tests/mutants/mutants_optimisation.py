"""Bugs that a loss curve, a batch learnt by heart and weight scales show: B03, B04, W01 to W03."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.mutants import mutant
from tests.mutants.mutants_forward import around

SCALES = "axolotl f608d263a, branch weight-scale-norm"


@mutant("b160", case="B03/mixtral/-/single", issue="https://github.com/huggingface/trl/issues/3910")
def training_runs_in_another_dtype(patch: pytest.MonkeyPatch) -> None:
    """Weights are bfloat16 by default: the same losses at first, another curve after."""

    def make(original: Any) -> Any:
        return lambda cls, path, kwargs: original(cls, path, {**kwargs, "dtype": torch.bfloat16})

    around(patch, "impl.build:load_loudly", make)


@mutant("generic-smoothing", case="B04/mixtral/-/single", issue="checks.md B04 (no thread)")
def labels_are_smoothed_unasked(patch: pytest.MonkeyPatch) -> None:
    """The loss has a floor: a tenth of each label is spread over the vocabulary."""

    def make(original: Any) -> Any:
        def loss(model: Any, batch: Any, n: Any = None, **options: Any) -> Any:
            return original(model, batch, n, **{**options, "label_smoothing": 0.1})

        return loss

    around(patch, "impl.loss:loss", make)


@mutant("generic-about-zero", case="W01/-/-/-", issue=SCALES)
def weights_are_scaled_about_zero(patch: pytest.MonkeyPatch) -> None:
    """Rescaling moves the mean of a weight too."""

    def make(original: Any) -> Any:
        def rescale(parameter: Any, factor: float) -> None:
            with torch.no_grad():
                parameter.mul_(factor)

        return rescale

    around(patch, "impl.weight_scales:_rescale", make)


@mutant("generic-scaled-adapter", case="W02/-/-/-", issue=SCALES)
def adapters_are_rescaled_too(patch: pytest.MonkeyPatch) -> None:
    """An adapter whose name matches the rule is brought to the scale of the weights."""

    def make(original: Any) -> Any:
        return lambda name, parameter: original(name.replace("lora_", ""), parameter)

    around(patch, "impl.weight_scales:_measure", make)


@mutant("generic-pattern", case="W03/qwen3_5_moe-text/-/single", issue=SCALES)
def the_pattern_is_matched_from_the_start(patch: pytest.MonkeyPatch) -> None:
    """A rule that names the end of a parameter's name finds nothing to repair."""
    anchored = SimpleNamespace(search=re.match, compile=re.compile, error=re.error)
    patch.setattr("impl.weight_scales.re", anchored)
