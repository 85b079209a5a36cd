"""Context parallel: each rank holds a slice of every row, and gathers what attention needs of the
others.

Every rank is given the whole batch. Embeddings, images and masks are computed for the whole rows,
by the model's own code, from global positions; the first decoder layer cuts the hidden states to
this rank's slice and all layers work on it. Attention gathers the keys and values of all ranks
under autograd (the backward sums their gradients back), so sliding windows, image blocks and packed
rows are right because nothing about them is local. The mask is built for this rank's queries only,
from the model's own mask function with a query offset. A recurrent layer cannot be cut: it gathers
its input and keeps its slice of the output.

What comes out are the logits of this rank's slice and, with labels, its share of the loss: labels
are shifted before they are cut, so that no prediction across a border is lost. Each rank's
parameter gradients are its share of the sum; DistributedDataParallel over the same ranks adds them
up.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from .errors import Refused
from .parallel_data import wrapped_modules

IMPLEMENTATION = "context_parallel"
"""The name under which attention and mask are registered with transformers."""
RECURRENT = ("linear_attn",)
"""Child names of a decoder layer's recurrent mixers."""
_SPAN = "context_span"


@dataclass(frozen=True)
class Span:
    """This rank's slice of rows of `total` tokens."""

    total: int
    rank: int
    ranks: int

    def bounds(self, rank: int | None = None) -> tuple[int, int]:
        """First token and the one past the last, of a rank; slices differ by one token at most."""
        index = self.rank if rank is None else rank
        return index * self.total // self.ranks, (index + 1) * self.total // self.ranks

    @property
    def sizes(self) -> list[int]:
        """The lengths of all ranks' slices."""
        return [stop - start for start, stop in map(self.bounds, range(self.ranks))]

    def cut(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's slice of a tensor of whole rows."""
        start, stop = self.bounds()
        return tensor.narrow(dim, start, stop - start)


class _Gather(torch.autograd.Function):
    """Concatenate all ranks' slices along `dim`; backward returns the sum over ranks of this
    slice's gradient."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, span: Span, dim: int, group: Any) -> torch.Tensor:
        ctx.span, ctx.dim, ctx.group = span, dim, group
        padded = _padded(local.movedim(dim, 0), max(span.sizes))
        whole = padded.new_empty(span.ranks * padded.shape[0], *padded.shape[1:])
        dist.all_gather_into_tensor(whole, padded, group=group)
        parts = [
            part[:size] for part, size in zip(whole.chunk(span.ranks), span.sizes, strict=True)
        ]
        return torch.cat(parts).movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        span, longest = ctx.span, max(ctx.span.sizes)
        parts = torch.split(gradients[0].movedim(ctx.dim, 0), span.sizes)
        whole = torch.cat([_padded(part, longest) for part in parts]).contiguous()
        local = whole.new_empty(longest, *whole.shape[1:])
        dist.reduce_scatter_tensor(local, whole, group=ctx.group)
        local = local[: span.sizes[span.rank]].movedim(0, ctx.dim).contiguous()
        return local, None, None, None


def _padded(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The tensor with zeros up to `size` rows along its first dimension."""
    if tensor.shape[0] == size:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(size - tensor.shape[0], *tensor.shape[1:])])


def gather(local: torch.Tensor, span: Span, dim: int, group: Any) -> torch.Tensor:
    """All ranks' slices as one tensor, under autograd."""
    result: torch.Tensor = _Gather.apply(local, span, dim, group)  # type: ignore[no-untyped-call]
    return result


class ContextParallel:
    """What `enable` put on one model, and can take off again."""

    def __init__(self, model: nn.Module, wrap_classes: tuple[str, ...], mesh: Any) -> None:
        from transformers import AttentionInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

        self.group, self.rank, self.ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        layers = [module for _, module in wrapped_modules(model, wrap_classes)]
        self.config = _attention_config(layers)
        _check(self.config)
        self.base: str = self.config._attn_implementation
        if self.base not in ("eager", "sdpa"):
            raise Refused(
                f"cp: attention implementation {self.base!r}; it can be 'sdpa' or 'eager'"
            )
        self._mask = ALL_MASK_ATTENTION_FUNCTIONS[self.base]
        AttentionInterface.register(IMPLEMENTATION, self.attend)
        AttentionMaskInterface.register(IMPLEMENTATION, self.mask)
        self.config._attn_implementation = IMPLEMENTATION
        hooks = [layer.register_forward_pre_hook(self.cut, with_kwargs=True) for layer in layers]
        for layer in layers:
            for name in RECURRENT:
                if isinstance(mixer := getattr(layer, name, None), nn.Module):
                    hooks += self._wrap_recurrent(mixer)
        outer = getattr(model, "get_base_model", lambda: model)()
        hooks.append(outer.register_forward_pre_hook(self.cut_labels, with_kwargs=True))
        self._hooks = hooks

    def undo(self) -> None:
        """Take every hook off and give the model its own attention back."""
        for hook in self._hooks:
            hook.remove()
        self.config._attn_implementation = self.base

    def span(self, total: int) -> Span:
        """This rank's slice of rows of `total` tokens; Refused if some rank's would be empty."""
        if total < self.ranks:
            raise Refused(f"cp: rows of {total} tokens cannot be split over {self.ranks} ranks")
        return Span(total, self.rank, self.ranks)

    def cut(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before a decoder layer: whole rows to this rank's slice, and the span for what lies
        inside.

        The rotary tensors are whole at every layer and so tell the length; hidden states are whole
        at the first.
        """
        names = list(inspect.signature(type(layer).forward).parameters)[1 : len(args) + 1]
        kwargs = dict(kwargs)
        rotary = [v for n, v in (*zip(names, args, strict=True), *kwargs.items()) if _rotary(n)]
        span = self.span(_row_length(rotary))

        def cut(item: Any, dim: int) -> Any:
            whole = (
                isinstance(item, torch.Tensor) and item.ndim > 1 and item.shape[dim] == span.total
            )
            return span.cut(item, dim) if whole else item

        for name, value in kwargs.items():
            if _rotary(name) or name in ("hidden_states", "per_layer_input"):
                kwargs[name] = tree_map(lambda item: cut(item, -2), value)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = cut(kwargs["position_ids"], -1)
        kwargs[_SPAN] = span
        return tuple(tree_map(lambda item: cut(item, -2), item) for item in args), kwargs

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model's attention, of this rank's queries over all ranks' keys and values.

        query, key, value: [batch, heads, local tokens, head size]; mask: [batch, 1, local, whole].
        """
        span = kwargs.pop(_SPAN)
        if attention_mask is None:
            raise Refused("cp: attention without a mask; it would attend to the wrong positions")
        if key.shape == value.shape:
            key, value = gather(torch.stack([key, value]), span, 3, self.group).unbind(0)
        else:
            key, value = gather(key, span, 2, self.group), gather(value, span, 2, self.group)
        kwargs["is_causal"] = False  # the mask says it all
        forward = self._forward(module)
        result: tuple[torch.Tensor, torch.Tensor | None] = forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return result

    def _forward(self, module: nn.Module) -> Callable[..., Any]:
        """The attention function that the model would have used."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.base == "eager":
            modelling: Any = sys.modules[type(module).__module__]
            found: Callable[..., Any] = modelling.eager_attention_forward
            return found
        return ALL_ATTENTION_FUNCTIONS[self.base]  # type: ignore[no-any-return]

    def mask(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The model's mask of whole rows, built for this rank's queries only; never left out."""
        if "cache_position" in kwargs:  # the older signature
            span = self.span(len(kwargs["cache_position"]))
            kwargs["cache_position"] = span.cut(kwargs["cache_position"], 0)
        else:
            span = self.span(kwargs["q_length"])
            start, stop = span.bounds()
            kwargs["q_length"] = stop - start
            kwargs["q_offset"] = kwargs.get("q_offset", 0) + start
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        result: torch.Tensor | None = self._mask(*args, **kwargs)
        return result

    def _wrap_recurrent(self, mixer: nn.Module) -> list[Any]:
        """Hooks by which a recurrent mixer sees whole rows and gives this rank's slice."""
        spans: list[Span] = []

        def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            kwargs = dict(kwargs)
            spans.append(kwargs.pop(_SPAN))
            if args:
                args = (gather(args[0], spans[-1], 1, self.group), *args[1:])
            else:
                kwargs["hidden_states"] = gather(kwargs["hidden_states"], spans[-1], 1, self.group)
            return args, kwargs

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            span = spans.pop()
            if isinstance(output, tuple):
                return span.cut(output[0], 1), *output[1:]
            return span.cut(output, 1)

        return [
            mixer.register_forward_pre_hook(before, with_kwargs=True),
            mixer.register_forward_hook(after),
        ]

    def cut_labels(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before the model: labels shifted, then cut; a cache is left out, it would hold a
        slice."""
        kwargs = dict(kwargs)
        kwargs["use_cache"] = False
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        tokens = next(
            (kwargs[n] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None), None
        )
        if shifted is not None and tokens is not None and shifted.shape[-1] == tokens.shape[1]:
            kwargs["labels"] = kwargs["shift_labels"] = self.cut_targets(shifted)
        elif shifted is None and labels is not None:
            kwargs["labels"] = kwargs["shift_labels"] = self.split_labels(labels)
        return args, kwargs

    def cut_targets(self, targets: torch.Tensor) -> torch.Tensor:
        """This rank's slice of targets [batch, whole] that are shifted already."""
        return self.span(targets.shape[-1]).cut(targets, -1).contiguous()

    def split_labels(self, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
        """The targets of this rank's slice: labels [batch, whole] → [batch, local], already
        shifted."""
        shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return self.cut_targets(shifted)


def _attention_config(layers: list[nn.Module]) -> Any:
    """The one configuration that the layers' attention reads its implementation from."""
    found = {
        id(config): config
        for layer in layers
        for module in layer.modules()
        if (config := getattr(module, "config", None)) is not None
    }
    if len(found) != 1:
        raise Refused(f"cp: the layers have {len(found)} configurations, expected one")
    return next(iter(found.values()))


def _check(config: Any) -> None:
    """Refuse what would be computed from a slice alone."""
    if getattr(config, "output_router_logits", False):
        raise Refused(
            "cp: the auxiliary loss is a product of means over all tokens; a slice's own is"
            " another loss"
        )


def _rotary(name: str) -> bool:
    """Is a layer's argument of this name its rotary tensors?"""
    return name.startswith("position_embeddings")


def _row_length(rotary: list[Any]) -> int:
    """The number of tokens of whole rows, from a layer's rotary tensors [batch, tokens, size]."""
    lengths: list[int] = []
    tree_map(lambda item: lengths.append(item.shape[-2]), rotary)
    if not lengths:
        raise Refused(
            "cp: the decoder layer is given no rotary embeddings that tell the row's length"
        )
    return max(lengths)


def enable(model: nn.Module, wrap_classes: tuple[str, ...], mesh: Any) -> ContextParallel:
    """Make a model work on slices; the handle has `undo`, `span` and `split_labels`. One model at a
    time."""
    handle = ContextParallel(model, wrap_classes, mesh)
    object.__setattr__(model, "context_parallel", handle)
    return handle


def handle_of(model: nn.Module) -> ContextParallel | None:
    """The handle of a model, also under DDP, or None where rows are whole."""
    for candidate in (model, getattr(model, "module", None)):
        handle = getattr(candidate, "context_parallel", None)
        if isinstance(handle, ContextParallel):
            return handle
    return None


def local_targets(model: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """The targets (shifted labels) [batch, whole] that belong to the logits that `model` gives on
    this rank."""
    handle = handle_of(model)
    return targets if handle is None else handle.cut_targets(targets)
