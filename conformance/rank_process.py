"""What runs inside one rank: its process group, its seeds, its watchdogs, and how its outcome
travels.

The parent's side is `ranks.py`. Nothing here imports torch at import time: the module is data for
the plugin, and a forked rank finds torch already imported by the preloaded forkserver.
"""

from __future__ import annotations

import contextlib
import copyreg
import faulthandler
import gc
import io
import os
import pickle
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

GROUP_SHARE = 0.8
"""Process-group timeout as a share of the deadline: a collective that waits must fail before the
parent does."""
LAST_RESORT_SECONDS = 30.0
"""A rank ends itself this long after its deadline, even if its interpreter is stuck and its parent
is gone."""


@dataclass(frozen=True)
class RankContext:
    """What a function run by `ranks.run` knows about its rank.

    `device` is a torch device string (`cpu`, `cuda:1`); `scratch` is one directory shared by all
    ranks of a host, removed after the call.
    """

    rank: int
    world_size: int
    local_rank: int
    device: str
    scratch: Path
    timeout: float

    def at(self, place: str) -> None:
        """Say where this rank is: the last place said is named if the rank is killed."""
        (self.scratch / f"place.{self.rank}").write_text(place)


@dataclass(frozen=True)
class Start:
    """All that the parent tells a rank; `payload` is the pickled function and its arguments."""

    context: RankContext
    payload: bytes
    seed: int
    environment: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """How a rank ended. `error` is the pickled exception where it can be pickled, `when` its
    monotonic time."""

    value: bytes | None
    traceback: str = ""
    error: bytes | None = None
    when: float = 0.0


def _rebuild_tensor(data: bytes, dtype: Any, shape: tuple[int, ...], requires_grad: bool) -> Any:
    """The tensor whose bytes `_Pickler` wrote."""
    import torch

    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape).requires_grad_(requires_grad)


class _Pickler(pickle.Pickler):
    """Plain pickle, with tensors as bytes: no shared memory, no file descriptor that dies with its
    rank.

    A tensor arrives on the CPU, detached from its graph.
    """

    dispatch_table = copyreg.dispatch_table.copy()

    def reducer_override(self, item: Any) -> Any:
        """Reduce plain dense tensors to their bytes, everything else as pickle would."""
        torch = sys.modules.get("torch")
        if torch is None or type(item) not in (torch.Tensor, torch.nn.Parameter):
            return NotImplemented
        if item.layout != torch.strided or item.is_quantized:
            return NotImplemented
        flat = item.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        leaf_grad = bool(item.requires_grad and item.is_leaf)
        return _rebuild_tensor, (bytes(flat.numpy()), item.dtype, tuple(item.shape), leaf_grad)


def dumps(item: Any) -> bytes:
    """Pickle `item`; a function must be importable by name in another process."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(item)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """Undo `dumps`; only for bytes that this very run's own processes wrote."""
    return pickle.loads(data)


def seed_everything(seed: int) -> None:
    """The same seeds on every rank, for Python, NumPy and torch."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _failure(error: BaseException) -> Outcome:
    """The outcome of a rank that raised."""
    text = "".join(traceback.format_exception(error))
    pickled: bytes | None
    try:
        pickled = dumps(error)
        loads(pickled)
    except Exception:
        pickled = None
    return Outcome(None, text, pickled, time.monotonic())


def execute(context: RankContext, payload: bytes) -> Outcome:
    """Call the pickled function with `context` and its arguments; never raises."""
    try:
        fn, args = loads(payload)
        return Outcome(dumps(fn(context, *args)))
    except BaseException as error:
        return _failure(error)


@contextlib.contextmanager
def process_group(context: RankContext, store: Any) -> Iterator[None]:
    """The default process group of a call, destroyed on the clean path only.

    gloo on the CPU; NCCL on CUDA (gloo stays for CPU tensors), bound to its device and tried with
    one small all-reduce.
    """
    import torch
    import torch.distributed as dist

    options: dict[str, Any] = {"backend": "gloo"}
    if context.device.startswith("cuda"):
        torch.cuda.set_device(context.device)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device(context.device)}
    dist.init_process_group(
        store=store,
        rank=context.rank,
        world_size=context.world_size,
        timeout=timedelta(seconds=max(1.0, GROUP_SHARE * context.timeout)),
        **options,
    )
    if context.device.startswith("cuda"):
        ones = torch.ones(1, device=context.device)
        dist.all_reduce(ones)
        if ones.item() != context.world_size:
            raise RuntimeError(
                f"all-reduce of ones gave {ones.item()} on {context.world_size} ranks"
            )
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _loopback() -> str | None:
    """The name of the loopback interface, over which ranks of one host always reach each other."""
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), None)


def _enter(start: Start) -> None:
    """Make a forked process the rank: own session, environment, output files, stack dump on
    SIGUSR1."""
    context = start.context
    with contextlib.suppress(OSError):
        os.setsid()
    os.environ.clear()
    os.environ.update(start.environment)
    os.environ.update(RANK=str(context.rank), WORLD_SIZE=str(context.world_size))
    os.environ.update(LOCAL_RANK=str(context.local_rank), LOCAL_WORLD_SIZE=str(context.world_size))
    loopback = _loopback()
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    output = os.open(
        context.scratch / f"output.{context.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND
    )
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    stacks = open(context.scratch / f"stack.{context.rank}", "w")  # noqa: SIM115 (for life)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faulthandler.dump_traceback_later(context.timeout + LAST_RESORT_SECONDS, exit=True, file=stacks)
    threading.Thread(target=_die_with_parent, args=(context,), daemon=True).start()


def _die_with_parent(context: RankContext) -> None:
    """Wait for the parent's end, then take the scratch directory and this rank's whole session
    along."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(context.scratch, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)


def quiet_progress_bars() -> None:
    """A progress bar makes a named semaphore, which a process that leaves by `_exit` would leave
    behind, and a thread, which a fork would lose."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.set_lock(threading.RLock())
        sys.modules["tqdm"].tqdm.monitor_interval = 0


def rank_main(connection: Connection, start: Start) -> None:
    """Life of a forked rank: hello, meet the others, run, report, wait for the parent's release,
    leave.

    The ranks meet when all have said hello, and the deadline counts from when all have met: however
    slow a start is, a collective that waits for a peer fails before the parent gives up.
    A rank that is done keeps its process group until all are: else a peer's last collective could
    lose its connection, and a skipped collective would show as that instead of as a wait.
    """
    _enter(start)
    import torch
    from torch._C._distributed_c10d import FileStore

    if torch.cuda._initialized:
        connection.send(_failure(RuntimeError("the forkserver's preload created a CUDA context")))
        os._exit(1)
    torch.set_num_threads(1)
    gc.set_threshold(20_000)  # a rank lives for a second
    seed_everything(start.seed)
    quiet_progress_bars()
    connection.send("hello")
    connection.recv()
    context = start.context
    try:
        store = FileStore(str(context.scratch / "store"), context.world_size)
        with process_group(context, store):
            connection.send("met")
            outcome = execute(context, start.payload)
            connection.send(outcome)
            if outcome.value is None:
                os._exit(1)
            connection.recv()
            if context.device == "cpu":
                os._exit(0)  # library teardown costs more than a small case; so does gloo's
    except BaseException as error:
        with contextlib.suppress(OSError):
            connection.send(_failure(error))
        os._exit(1)
    os._exit(0)


_calls = 0
_base_store: Any = None


def run_in_place(payload: bytes, device: str, timeout: float, seed: int) -> list[Outcome]:
    """Run the call on this very process, one of the ranks that `torchrun` started; outcomes by
    rank.

    Every call has a process group of its own. Outcomes travel through the launcher's store, which a
    broken collective leaves intact. A rank that is stuck past `timeout` dumps its stacks and exits;
    the launcher then ends the others.
    """
    global _base_store, _calls
    import torch
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    if _base_store is None:
        _base_store, _, _ = next(iter(rendezvous("env://", rank, world_size)))
    _calls += 1
    store: Any = PrefixStore(f"conformance/{_calls}", _base_store)
    store.set_timeout(timedelta(seconds=timeout))
    scratch = _shared_scratch(store, rank)
    where = f"cuda:{local}" if device == "cuda" else device
    context = RankContext(rank, world_size, local, where, scratch, timeout)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seed_everything(seed)
    faulthandler.dump_traceback_later(timeout, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        with process_group(context, PrefixStore("group", store)):
            outcome = execute(context, payload)
            store.set(f"outcome/{rank}", dumps(outcome))
            outcomes = [loads(store.get(f"outcome/{other}")) for other in range(world_size)]
        store.set(f"left/{rank}", b"1")
        store.wait([f"left/{other}" for other in range(world_size)])
    finally:
        faulthandler.cancel_dump_traceback_later()
        torch.set_num_threads(threads)
        shutil.rmtree(scratch, ignore_errors=True)
    return outcomes


def _shared_scratch(store: Any, rank: int) -> Path:
    """Rank 0's fresh directory; ranks of another host get an empty one of the same name."""
    if rank == 0:
        store.set("scratch", tempfile.mkdtemp(prefix="conformance-ranks-"))
    scratch = Path(store.get("scratch").decode())
    scratch.mkdir(exist_ok=True)
    return scratch
