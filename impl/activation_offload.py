"""Activation offloading: what autograd saves goes to host memory or to disk, and comes back for the
backward.

Modes: True (pinned host memory, copied on a stream of its own), "legacy" (no stream), "disk", and
"hidden_states" (only the inputs of checkpointed layers). On the CPU the same path makes copies, so
that a mistake about aliasing shows there too. Small tensors and parameters stay. Everything that is
kept belongs to the autograd graph: it goes when the graph goes, whether or not it was ever asked
for.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import Refused

MODES = (True, "legacy", "disk", "hidden_states")
SMALLEST_BYTES = 1024
"""Tensors below this stay where they are: the copy would cost more than the memory."""
STASH = 5
"""Device tensors whose copy may still be under way: they must live until it is done."""


class Stash:
    """One saved tensor, away from its device; owned by the autograd graph alone.

    `source` is a weak reference to the storage it came from: while it is held the storage's address
    cannot be another's, so that a stash found by address is never a stale one.
    """

    def __init__(self, tensor: torch.Tensor, keeper: Keeper) -> None:
        self.device = tensor.device
        self.shape = tensor.shape
        self.source = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self.keeper = keeper
        self.requires_grad = tensor.requires_grad
        self.token: Any = keeper.put(_unexpanded(tensor))

    def load(self) -> torch.Tensor:
        """The tensor on its device again: same values and shape, strides by `packed_strides`."""
        return self.keeper.get(self.token, self.device).expand(self.shape)


class Keeper:
    """Where tensors go: host memory, by a plain copy."""

    def put(self, tensor: torch.Tensor) -> Any:
        """Take a tensor; returns what `get` needs."""
        return _host_like(tensor).copy_(tensor)

    def get(self, token: Any, device: torch.device) -> torch.Tensor:
        """The tensor on `device`, a new one every time."""
        return _like(token, device).copy_(token)

    def close(self) -> None:
        """Give back what the keeper itself holds."""


class StreamKeeper(Keeper):
    """Pinned host memory, copied on a side stream in both directions; on the CPU a plain copy."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        self.pending: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def put(self, tensor: torch.Tensor) -> Any:
        """Start the copy to pinned memory; the tensor lives until it is done."""
        if not tensor.is_cuda:
            return super().put(tensor)
        if self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(tensor.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            host = _host_like(tensor).copy_(tensor, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self.stream)
        self.pending.append((done, tensor))
        while len(self.pending) > STASH:
            # Memory freed now is reused in the current stream's order: waiting there is enough.
            current.wait_event(self.pending.popleft()[0])
        return host

    def get(self, token: Any, device: torch.device) -> torch.Tensor:
        """Start the copy back; the current stream waits for it."""
        if device.type != "cuda" or self.stream is None:
            return super().get(token, device)
        current = torch.cuda.current_stream(device)
        self._settle(current)
        with torch.cuda.stream(self.stream):
            tensor = _like(token, device).copy_(token, non_blocking=True)
        current.wait_stream(self.stream)
        tensor.record_stream(current)
        return tensor

    def _settle(self, current: torch.cuda.Stream) -> None:
        """Let go of the last forward's tensors once a backward has begun."""
        while self.pending:
            current.wait_event(self.pending.popleft()[0])

    def close(self) -> None:
        """Wait for copies that are still under way."""
        for done, _ in self.pending:
            done.synchronize()
        self.pending.clear()


class DiskKeeper(Keeper):
    """One file a tensor in a private directory; a file goes with its stash."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="activations-"))
        self.count = 0
        self._remove = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)

    def put(self, tensor: torch.Tensor) -> Any:
        """Write a file."""
        path = self.directory / str(self.count)
        self.count += 1
        torch.save(_host_like(tensor, pinned=False).copy_(tensor), path)
        return _File(path)

    def get(self, token: Any, device: torch.device) -> torch.Tensor:
        """Read the file."""
        return super().get(torch.load(token.path, weights_only=True), device)

    def close(self) -> None:
        """Remove the directory."""
        self._remove()


class _File:
    """A file that is removed when nobody knows it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, path.unlink, missing_ok=True)


ALIGNMENT = 16
"""Elements: attention kernels refuse, in the backward, a mask whose rows are no longer aligned."""


def packed_strides(tensor: torch.Tensor) -> list[int]:
    """Strides, in elements, of a copy without the gaps of a view, in the same order of dimensions,
    each a multiple of what its old stride was a multiple of (up to `ALIGNMENT`).

    A mask of 169 columns is a view of rows padded to 176: sdpa's backward on a GPU wants the rows
    of the copy at multiples of 8 again. Expanded dimensions (stride 0) stay so.
    """
    strides, reach = [0] * tensor.dim(), 1
    for dim in sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), -d)):
        old = tensor.stride(dim)
        if old:
            step = math.gcd(old, ALIGNMENT) if reach > 1 else 1
            strides[dim] = -(-reach // step) * step
            reach = strides[dim] * tensor.size(dim)
    return strides


def _unexpanded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with one element along every expanded dimension: the rest is not copied."""
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _like(tensor: torch.Tensor, device: torch.device | str, pinned: bool = False) -> torch.Tensor:
    """An empty tensor with `packed_strides`."""
    return torch.empty_strided(
        tensor.shape, packed_strides(tensor), dtype=tensor.dtype, device=device, pin_memory=pinned
    )


def _host_like(tensor: torch.Tensor, pinned: bool = True) -> torch.Tensor:
    """An empty host tensor for a copy of `tensor`; pinned if it comes from a GPU."""
    return _like(tensor.detach(), "cpu", pinned and tensor.is_cuda)


class Offloader:
    """The pair of saved-tensor hooks; `context()` puts them in force."""

    def __init__(
        self, keeper: Keeper, wanted: Callable[[torch.Tensor], bool] | None = None
    ) -> None:
        self.keeper = keeper
        self.wanted = wanted
        self.parameters: set[int] = set()
        self.packed = 0
        self.packed_bytes = 0
        self._known: weakref.WeakValueDictionary[tuple[Any, ...], Stash] = (
            weakref.WeakValueDictionary()
        )

    def learn(self, model: nn.Module) -> None:
        """Note the parameters' storages, which are never offloaded; sharding and steps may have
        moved them."""
        self.parameters = {
            parameter.untyped_storage()._cdata
            for parameter in model.parameters()
            if not isinstance(parameter, DTensor)
        }

    def eligible(self, tensor: torch.Tensor) -> bool:
        """Is a saved tensor one to offload?"""
        if (
            type(tensor) is not torch.Tensor
            or tensor.layout != torch.strided
            or tensor.is_quantized
        ):
            return False  # parameters, DTensors and other subclasses stay
        if tensor.numel() * tensor.element_size() < SMALLEST_BYTES:
            return False
        if isinstance(tensor._base, nn.Parameter):
            return False
        if tensor.untyped_storage()._cdata in self.parameters:
            return False
        return self.wanted is None or self.wanted(tensor)

    def pack(self, tensor: torch.Tensor) -> Any:
        """Called by autograd for what it saves; the same view of the same content is stashed
        once."""
        if not self.eligible(tensor):
            # a node whose backward never runs would hold its own output, which holds the node
            return tensor if tensor.grad_fn is None else tensor.detach()
        storage = tensor.untyped_storage()
        place = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        key = (*place, tensor.dtype, tensor._version)
        stash = self._known.get(key)
        if stash is None:
            stash = self._known[key] = Stash(tensor, self.keeper)
            self.packed += 1
            self.packed_bytes += _unexpanded(tensor).numel() * tensor.element_size()
        return stash

    @staticmethod
    def unpack(packed: Any) -> torch.Tensor:
        """Called by autograd when the backward needs it."""
        return packed.load() if isinstance(packed, Stash) else packed

    def context(self) -> saved_tensors_hooks:
        """A context manager under which autograd's saved tensors are offloaded."""
        return saved_tensors_hooks(self.pack, self.unpack)


def _keeper(mode: bool | str) -> Keeper:
    """Where a mode puts tensors."""
    if mode == "disk":
        return DiskKeeper()
    return Keeper() if mode == "legacy" else StreamKeeper()


def enable(model: nn.Module, mode: bool | str, keeper: Keeper | None = None) -> Callable[[], None]:
    """Offload the activations of every training forward of `model`; returns the undo.

    keeper: where tensors go, if not where the mode says.

    Refused: an unknown mode; reentrant checkpointing where layers share keys and values (gradients
    of the producers are lost, L1); "hidden_states" without checkpointing, which would offload
    nothing.
    """
    if mode not in MODES:
        raise Refused(
            f"activation offloading {mode!r}; it is one of True, 'legacy', 'disk', 'hidden_states'"
        )
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    layers = [layer for layer in layers if hasattr(layer, "_gradient_checkpointing_func")]
    _refuse_reentrant(model, layers)
    if mode == "hidden_states":
        layers = [layer for layer in layers if not isinstance(layer, _model_class())]
        if not layers:
            raise Refused("activation offloading 'hidden_states' needs checkpointing; it is off")
        return _offload_layer_inputs(layers, keeper or StreamKeeper())
    return _offload_everything(model, Offloader(keeper or _keeper(mode)))


def _model_class() -> Any:
    """transformers' model base class: some models carry the checkpointing flag beside their
    layers."""
    from transformers import PreTrainedModel

    return PreTrainedModel


def _refuse_reentrant(model: nn.Module, layers: list[nn.Module]) -> None:
    """Reentrant checkpointing and shared K/V do not go together, whatever is offloaded."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    shared = getattr(text, "num_kv_shared_layers", 0)
    for layer in layers:
        function = layer._gradient_checkpointing_func
        if shared and getattr(function, "keywords", {}).get("use_reentrant"):
            raise Refused(
                f"activation offloading with reentrant checkpointing: {shared} layers share keys"
                " and values, whose producers would get wrong gradients; use non-reentrant"
                " checkpointing"
            )


def _offload_everything(model: nn.Module, offloader: Offloader) -> Callable[[], None]:
    """Put the hooks around the model's forward."""
    entered: list[contextlib.ExitStack] = []

    def before(module: nn.Module, args: Any) -> None:
        stack = contextlib.ExitStack()
        if module.training and torch.is_grad_enabled():
            offloader.learn(module)
            stack.enter_context(offloader.context())
        entered.append(stack)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop().close()

    first = model.register_forward_pre_hook(before)
    last = model.register_forward_hook(after, always_call=True)
    object.__setattr__(model, "activation_offloader", offloader)

    def undo() -> None:
        first.remove()
        last.remove()
        offloader.keeper.close()

    return undo


def _offload_layer_inputs(layers: list[nn.Module], keeper: Keeper) -> Callable[[], None]:
    """Put the hooks around each layer's checkpoint: what that saves is the layer's inputs, and only
    the hidden states of those are worth moving (the first argument; what is shared by all layers
    stays)."""
    originals: list[Any] = [layer._gradient_checkpointing_func for layer in layers]

    def offloading(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            place = args[0].data_ptr(), args[0].shape
            offloader = Offloader(keeper, lambda t: (t.data_ptr(), t.shape) == place)
            with offloader.context():
                return checkpoint(function, *args, **kwargs)

        run.keywords = getattr(checkpoint, "keywords", {})  # type: ignore[attr-defined]
        return run

    for layer, original in zip(layers, originals, strict=True):
        layer._gradient_checkpointing_func = offloading(original)  # type: ignore[assignment]

    def undo() -> None:
        for layer, original in zip(layers, originals, strict=True):
            layer._gradient_checkpointing_func = original
        keeper.close()

    return undo


@contextlib.contextmanager
def offloading(model: nn.Module, mode: bool | str = True) -> Iterator[None]:
    """`enable` for the length of a block."""
    undo = enable(model, mode)
    try:
        yield
    finally:
        undo()
