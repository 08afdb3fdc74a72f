"""Measures how long each phase of the work takes, and reports the current phase to the heartbeat."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.runtime.distributed import on_gpu
from common.runtime.heartbeat import set_phase
from common.training.memory import named_when_out_of_memory


class PhaseClock:
    """Seconds by phase, added up over all times that a phase is entered. Phases must not be nested.

    Attributes:
        seconds: of each phase since `reset`, in the order in which they were first entered.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time within the context to that of `name`, unless the context ends with an exception."""
        set_phase(name)
        start = now()
        with named_when_out_of_memory(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now() - start

    def reset(self) -> None:
        """Set all times to 0."""
        self.seconds = {}
        self._start = now()

    def total(self) -> float:
        """Seconds since `reset`, those between the phases included."""
        return now() - self._start


def now() -> float:
    """Seconds of a monotonic clock, read when the GPU has finished all kernels that were launched.

    Kernels run asynchronously; their time belongs to the phase that launched them.
    """
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()
