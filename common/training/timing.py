"""Which part of the work a rank is in, and how long each part takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common.runtime.distributed import on_gpu
from common.runtime.heartbeat import set_phase
from common.training.memory import named_when_out_of_memory


class PhaseClock:
    """Seconds by phase, added up over all times that a phase is entered; phases lie side by side, not in each other.

    Attributes:
        seconds: of each phase since `reset`, in the order in which they were first entered.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time within the context belongs to `name`, unless it ends with an exception."""
        set_phase(name)
        start = now()
        with named_when_out_of_memory(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now() - start

    def reset(self) -> None:
        """Begin anew."""
        self.__init__()

    def total(self) -> float:
        """Seconds since `reset`, those between the phases included."""
        return now() - self._start


def now() -> float:
    """Seconds of a clock that never goes back, once all that was given to a GPU is done: kernels run behind, and their
    time belongs to the phase that launched them."""
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()
