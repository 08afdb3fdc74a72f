"""Applies a function to many items on all cores, with ordered results and few items in memory at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from common.errors import UserError
from common.runtime.distributed import cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_ALONE = 4  # items done before any process is started: small data needs none
_MOST_PROCESSES = 8  # the one process that reads the items cannot keep more of them busy

_function: Callable | None = None


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map`, by several processes if there are enough cores and items; each holds two items at a time.

    Raises:
        UserError: a process was ended from outside. Errors of the function pass through.
    """
    items = iter(items)
    processes = min(cores(), _MOST_PROCESSES)
    yield from map(function, items if processes == 1 else islice(items, _ALONE))
    for further in items:
        yield from _by_processes(function, chain([further], items), processes)


def _by_processes(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    # Forked: then the function (usually with a tokenizer) is not copied, and the program not imported again.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin, (function,))
    waiting: deque[Future] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a process that prepared data was ended from outside, mostly for want of memory: free some, and start again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable) -> None:
    global _function
    _function = function
    for number in (signal.SIGINT, signal.SIGTERM):  # the program handles them and then ends its processes
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its program is gone: a program that is killed cannot end its processes, and they would wait
    for items for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in the processes of a pool alone
    wait([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None  # `_begin` has run first
    return _function(item)
