"""What older releases of transformers lack, in small stand-ins: each probe says yes to the old
shape, no to the installed one of today, and each repair takes itself back."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from conformance import checkpoint
from conformance.families import MODELS
from conformance.implementation import Exclusion
from impl.errors import Refused
from impl.kernels.cross_entropy_models import calls_loss_function
from impl.patches import (
    float16_pooling,
    image_blocks_past_window,
    image_type_ids,
    router_probabilities,
    router_softmax,
    shared_kv_in_cache,
    static_cache_without_layers,
)
from tests.impl.plans import make_plan, spec


class CacheReader(nn.Module):
    """An attention that finds shared keys and values where 5.5 put them."""

    is_kv_shared_layer = True

    def forward(self, hidden: torch.Tensor, past_key_values: Any = None) -> Any:
        if past_key_values is not None:
            return past_key_values.shared_layers[0]
        return hidden


def test_keys_shared_through_the_cache_alone_are_refused() -> None:
    model = nn.Sequential(CacheReader())
    assert shared_kv_in_cache.applies_to(model, make_plan())
    with pytest.raises(Refused, match="45242"):
        shared_kv_in_cache.apply(model, make_plan())
    model[0].is_kv_shared_layer = False
    assert not shared_kv_in_cache.applies_to(model, make_plan())
    assert shared_kv_in_cache.why_not("no_such_family") is None


def test_a_static_cache_without_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint.build_stock(spec("gemma4-text"))
    monkeypatch.setattr(static_cache_without_layers, "makes_none", lambda config: True)
    assert static_cache_without_layers.applies_to(model, make_plan())
    undo = static_cache_without_layers.apply(model, make_plan())
    empty = SimpleNamespace(layers=[], layer_class_to_replicate=None)
    with pytest.raises(Refused, match="pass a DynamicCache"):
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=empty)
    undo()


class Router(nn.Module):
    """A router that returns probabilities, in the dtype of its weights."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, 4, bias=False)
        self.per_expert_scale = nn.Parameter(torch.ones(4))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = nn.functional.softmax(self.proj(hidden), dim=-1)
        return probabilities, probabilities * self.per_expert_scale


class LogitRouter(Router):
    """One that returns logits."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.proj(hidden)
        return logits, nn.functional.softmax(logits, dim=-1, dtype=torch.float32)


def test_a_low_precision_softmax_is_taken_in_float32() -> None:
    config = SimpleNamespace(hidden_size=8)
    assert router_softmax.in_low_precision(Router, config)
    assert not router_softmax.in_low_precision(LogitRouter, config)
    model: Any = nn.Sequential(Router(config)).to(torch.bfloat16)
    model.config = config
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    undo = router_softmax.apply(model, make_plan())
    probabilities, _ = model(hidden)
    want = (hidden @ model[0].proj.weight.T).float().softmax(-1)
    assert probabilities.dtype == torch.float32 and torch.equal(probabilities, want)
    undo()
    assert model(hidden)[0].dtype == torch.bfloat16 and "forward" not in vars(model[0])


def test_probabilities_become_logits_for_the_balancing_loss() -> None:
    config = SimpleNamespace(hidden_size=8)
    assert router_probabilities.records_probabilities(Router, config)
    assert not router_probabilities.records_probabilities(LogitRouter, config)
    given = torch.tensor([[0.25, 0.75, 0.0]], requires_grad=True)
    seen = router_probabilities._of_logarithms(lambda logits: logits[0].softmax(-1))((given,))
    assert torch.allclose(seen, given.detach(), atol=1e-6)
    seen[0, 0].backward()
    assert given.grad is not None and bool(given.grad.isfinite().all())


def test_blocks_end_at_the_window() -> None:
    blocks = torch.tensor([[-1, 0, 0, 0, 0, 1]])
    kept: dict[str, Any] = {}

    def original(config: Any, **given: Any) -> None:
        kept.update(given)

    wrapped = image_blocks_past_window._inside_the_window(original)
    wrapped(SimpleNamespace(sliding_window=3), block_sequence_ids=blocks)
    positions = torch.arange(7)  # one past the end, as a static cache has
    joined = [[bool(kept["or_mask_function"](0, 0, q, k)) for k in positions] for q in positions]
    pairs = {(q, k) for q, row in enumerate(joined) for k, yes in enumerate(row) if yes}
    image = range(1, 5)
    assert pairs == {(q, k) for q in image for k in image if k > q - 3} | {(5, 5)}
    kept.clear()
    wrapped(SimpleNamespace(sliding_window=3))
    assert kept == {}


def test_text_gets_the_ids_that_a_class_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_causal_mask_mapping(
        config: Any, embeds: Any, mask: Any, cache: Any, positions: Any, is_training: bool = False
    ) -> None:
        if is_training:
            raise ValueError("`mm_token_type_ids` is required as a model input when training")

    model: Any = checkpoint.build_stock(spec("gemma4-dense"))
    module = ModuleType("old")
    module.create_causal_mask_mapping = create_causal_mask_mapping  # type: ignore[attr-defined]
    monkeypatch.setattr(image_type_ids.inspect, "getmodule", lambda cls: module)
    assert image_type_ids.demands_ids_of_text(model)
    undo = image_type_ids.apply(model, make_plan())
    seen: list[Any] = []
    look = model.model.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(kwargs.get("mm_token_type_ids")), with_kwargs=True
    )
    model.train()(input_ids=torch.tensor([[5, 6, 7]]))
    assert torch.equal(seen[0], torch.zeros(1, 3, dtype=torch.long))
    model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen[1] is None
    look.remove()
    undo()


def test_float16_is_pooled_in_float32() -> None:
    class Pooler(nn.Module):
        hidden_size, root_hidden_size = 4, 2.0

        def forward(self, hidden: Any, places: Any, padding: Any, length: int) -> Any:
            return hidden * self.root_hidden_size, ~padding

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pooler = Pooler()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, pixels: torch.Tensor) -> Any:
            padding = torch.zeros(pixels.shape[:2], dtype=torch.bool)
            hidden, _ = self.pooler(pixels, None, padding, 1)
            from transformers.modeling_outputs import BaseModelOutput

            return BaseModelOutput(last_hidden_state=hidden * 0.5)

    model = nn.Sequential(Tower()).half()
    large = torch.full((1, 1, 4), 4e4, dtype=torch.float16)
    assert not bool(model(large).last_hidden_state.isfinite().all())
    assert float16_pooling.applies_to(model, make_plan())
    undo = float16_pooling.apply(model, make_plan())
    out = model(large).last_hidden_state
    assert out.dtype == torch.float16 and torch.equal(out, large)
    undo()
    assert not bool(model(large).last_hidden_state.isfinite().all())


def test_a_loss_of_its_own_is_found_in_the_forward() -> None:
    class Own(nn.Module):
        def forward(self, logits: Any, labels: Any) -> Any:
            return nn.CrossEntropyLoss()(logits, labels)

    class Shared(nn.Module):
        loss_function: Any = None

        def forward(self, logits: Any, labels: Any) -> Any:
            return self.loss_function(logits, labels)

    assert calls_loss_function(Shared) and not calls_loss_function(Own)


def test_an_exclusion_asks_its_probe() -> None:
    answers: list[str | None] = ["this release cannot", None]
    limit = Exclusion("old releases cannot", probe=lambda: answers.pop(0))
    case: Any = SimpleNamespace(
        model=MODELS["mixtral"], setting=None, strategy=None, check=SimpleNamespace(id="A01")
    )
    assert limit.against(case) == "this release cannot"
    assert limit.against(case) is None
    assert Exclusion("never").against(case) == "never"
