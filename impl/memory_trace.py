"""The memory of one training step, found by running it on the meta device and counting bytes.

Every storage that comes to life is counted until it dies, through the forward, autograd's own
frees, checkpoint recomputation and the backward, for a model of real size in seconds and without
memory. Attention is replaced by one that keeps what a fused kernel keeps; a value that a model
asks of a tensor that has none (is the mask all true?) is answered "yes".
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import activation_offload
from .activation_offload import Keeper
from .training_plan import TrainingPlan

ATTENTION = "memory_trace"


@dataclass
class Trace:
    """What a step holds beside the weights, in bytes.

    peaks: gradients alive → the most of everything else at that moment (activations and
    temporaries). host: offloaded at the fullest. gradients: of all trainable parameters.
    """

    peaks: dict[int, int] = field(default_factory=dict)
    host: int = 0
    gradients: int = 0

    def peak(self, gradient_share: float = 1.0, other_share: float = 1.0) -> tuple[int, int]:
        """(total, activations) at the fullest moment, of scaled gradients and everything else."""
        best = max(self.peaks.items(), key=lambda p: p[0] * gradient_share + p[1] * other_share)
        return round(best[0] * gradient_share + best[1] * other_share), round(best[1] * other_share)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make, until each is freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.other = 0
        self.gradient = 0
        self._known: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._known[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and take its new storages into account."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten._grouped_mm.default and args[0].is_meta:
            result = _grouped(*args[:3], **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                self._see(leaf)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.other += size
        self._mark()

    def _mark(self) -> None:
        self.trace.peaks[self.gradient] = max(self.trace.peaks.get(self.gradient, 0), self.other)

    def _forget(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.other -= size

    def accumulated(self, parameter: torch.Tensor) -> None:
        """A gradient is there: its bytes are gradients from now on."""
        if parameter.grad is None:
            return
        key = parameter.grad.untyped_storage()._cdata
        if self._known.pop(key, None) is not None:
            size = parameter.grad.untyped_storage().nbytes()
            self.other -= size
            self.gradient += size
            self._known[key] = None
            self._mark()


def _grouped(
    left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """The output of a grouped product; torch's own shape function knows bfloat16 only."""
    rows, columns = left.shape[-2], right.shape[-1]
    if left.ndim == right.ndim == 2:
        assert offs is not None
        product: torch.Tensor = left.new_empty(offs.shape[0], rows, columns)
        return product
    grouped = (left.shape[0], rows, columns) if left.ndim == 3 == right.ndim else (rows, columns)
    result: torch.Tensor = left.new_empty(grouped)
    return result


class HostCounter(Keeper):
    """Offloads to nowhere and counts what lies there."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0

    def put(self, tensor: torch.Tensor) -> Any:
        """Count a tensor until its stash goes."""
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        return _Gone(self, size, tensor.shape, tensor.dtype)

    def get(self, token: Any, device: torch.device) -> torch.Tensor:
        """A tensor of that shape on the device again."""
        return torch.empty(token.shape, dtype=token.dtype, device=device)


class _Gone:
    """What is known of an offloaded tensor."""

    def __init__(self, counter: HostCounter, size: int, shape: Any, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        weakref.finalize(self, _subtract, counter, size)


def _subtract(counter: HostCounter, size: int) -> None:
    counter.now -= size


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention keeps: queries, keys, values, output and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
        output: torch.Tensor = query.new_empty(*query.shape[:-1], value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [batch, heads, tokens, size] → [batch, tokens, heads, …].

    Under a mask transformers repeats keys and values for grouped queries, so that they are kept
    once a query head.
    """
    groups = query.shape[1] // key.shape[1]
    if attention_mask is not None and groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    output: torch.Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def _counting_attention(model: nn.Module) -> Iterator[None]:
    """The model with an attention that runs on meta tensors as a fused kernel keeps memory."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: getattr(c, "_attn_implementation", None) for key, c in configs.items()}
    chosen = {key: c for key, c in configs.items() if before[key] == "sdpa"}
    for config in chosen.values():
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for key, config in chosen.items():
            config._attn_implementation = before[key]


class _FusedLoss(torch.autograd.Function):
    """Keeps what a fused loss keeps: the hidden states' gradient, made in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty_like(hidden))
        ctx.weight = torch.empty_like(weight) if weight.requires_grad else None
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return ctx.saved_tensors[0], ctx.weight


def _loss(model: Any, ids: torch.Tensor, fused: bool) -> torch.Tensor:
    """The training loss with every token labelled, its float32 copy of the logits included."""
    if fused:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
        weight = inner.get_output_embeddings().weight
        loss: torch.Tensor = _FusedLoss.apply(hidden, weight)  # type: ignore[no-untyped-call]
        return loss
    logits = model(input_ids=ids, use_cache=False).logits
    rows = logits.flatten(0, 1)[torch.arange(ids.numel(), device=ids.device)]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return nn.functional.cross_entropy(rows, ids.flatten(), reduction="sum") / ids.numel()


def trace_step(model: nn.Module, plan: TrainingPlan, batch: int, tokens: int) -> Trace:
    """Trace forward and backward of `batch` rows of `tokens` text tokens.

    model: on the meta device, frozen and adapted as it is to be trained. plan: checkpointing,
    offload and loss are switched on as it says, for the length of the call.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    host = HostCounter()
    with ExitStack() as stack:
        stack.enter_context(_counting_attention(model))
        if plan.checkpointing is not None:
            kwargs = dict(plan.checkpointing)
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            stack.callback(inner.gradient_checkpointing_disable)
        if plan.offload:
            stack.callback(activation_offload.enable(model, plan.offload, host))
        model.train()
        live = LiveBytes(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(live.accumulated) for p in trainable]  # type: ignore[no-untyped-call]
        device = next(model.parameters()).device
        ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
        with live:
            _loss(model, ids, plan.fused_loss).backward()  # type: ignore[no-untyped-call]
        for hook in hooks:
            hook.remove()
        for parameter in trainable:
            parameter.grad = None
    live.trace.host = host.most
    live.trace.gradients = live.gradient
    return live.trace
