"""Starts of ranks ahead of the cases that read them, while this process runs other cases.

Where one process runs all cases, it waits for ranks or they wait for it, and half of a machine is
idle. So starts run on threads, which only wait for their ranks, in the order in which the cases
will ask. What a start gave, or raised, is kept until it is asked for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

IN_FLIGHT = 2  # starts at once: two ranks wait for each other at every collective

T = TypeVar("T")
_promised: dict[Hashable, Future[Any]] = {}
_state = threading.Condition()
_held = False
_running = 0


def begin(starts: Iterable[tuple[Hashable, Callable[[], Any]]]) -> Callable[[], None]:
    """Run each key's start once, in the background and in order; call the result at the end of the
    run: it drops those that have not begun and waits for the others."""
    pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="conformance-ahead")
    for key, start in starts:
        if key not in _promised:
            _promised[key] = pool.submit(_unless_held, start)

    def end() -> None:
        pool.shutdown(wait=True, cancel_futures=True)
        _promised.clear()

    return end


def _unless_held(start: Callable[[], T]) -> T:
    global _running
    with _state:
        _state.wait_for(lambda: not _held)
        _running += 1
    try:
        return start()
    finally:
        with _state:
            _running -= 1
            _state.notify_all()


def taken(key: Hashable, start: Callable[[], T]) -> T:
    """What the start of this key gave or raised ahead; else what it gives now."""
    promised = _promised.pop(key, None)
    if promised is None or _held or promised.cancel():
        return start()
    found: T = promised.result()
    return found


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Nothing runs in the background for the length of a block."""
    global _held
    with _state:
        _held = True
        _state.wait_for(lambda: not _running)
    try:
        yield
    finally:
        with _state:
            _held = False
            _state.notify_all()
