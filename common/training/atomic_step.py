"""Applies each optimizer step to all engines of a run, or to none of them.

A loss or gradient that is not finite, in one model on one rank, would spread to the weights of all ranks, and through
the next rollout to the other model. So no engine steps before all ranks know that everything is finite. Otherwise all
gradients are discarded, and weights, optimizer states and learning-rate schedules stay as they were, bit for bit.

The cost: the gradients of all engines are in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.errors import TooManySkips
from common.runtime.distributed import gather_objects, global_sum, say
from common.training.engine import Engine, MicroBatch, TrainedEngine, accumulate
from common.training.gradients import discard_gradients


class AtomicStep:
    """Decides for each optimizer step whether it is applied.

    For each step the caller first calls `accumulate` for every engine. If `finite_on_all_ranks` then returns True, it
    calls the `step` of every engine; otherwise it calls `skip`. An engine that is to stay as it is in a step takes no
    part in it: neither `accumulate` nor `step` is called for it.

    Args:
        engines: by the name of their model.
        limit: the number of consecutive skipped steps that ends the run.

    Attributes:
        skipped: number of skipped optimizer steps in the whole run, including those that fp16 needs to find its loss
            scale.
        consecutive_skips: number of steps skipped since the last applied one, without those that fp16 needs.
    """

    def __init__(self, engines: Mapping[str, TrainedEngine], limit: int):
        self.skipped = self.consecutive_skips = 0
        self._engines, self._limit = dict(engines), limit
        self._losses: dict[str, Tensor] = {}
        self._accumulated: set[str] = set()  # the engines that take part in the current step
        self._not_finite_here: list[str] = []
        self._not_finite_anywhere: list[str] = []

    def state_dict(self) -> dict[str, int]:
        """The counters, for a checkpoint."""
        return {"skipped": self.skipped, "consecutive_skips": self.consecutive_skips}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue counting from `state_dict` of an earlier run."""
        self.skipped, self.consecutive_skips = state["skipped"], state["consecutive_skips"]

    def last_step_applied(self) -> bool:
        """Whether the last optimizer step was applied."""
        return not self.consecutive_skips

    def accumulate(
        self,
        name: str,
        loss: str,
        micro_batches: Iterable[MicroBatch],
        loss_of: Callable[[MicroBatch], Tensor],
    ) -> Tensor:
        """`common.training.engine.accumulate` for one engine.

        Args:
            name: of the engine.
            loss: the name of its loss in messages.
        """
        self._accumulated.add(name)
        self._losses[loss] = accumulate(self._engines[name], micro_batches, loss_of)
        return self._losses[loss]

    def finite_on_all_ranks(self) -> bool:
        """Whether every loss and gradient that was accumulated is finite on all ranks. The same on each rank.

        If so, the caller calls the `step` of every engine; otherwise it must call `skip`.
        """
        self._not_finite_here, self._not_finite_anywhere = self._find_not_finite()
        if self._not_finite_anywhere:
            return False
        self._reset_sums()
        self.consecutive_skips = 0
        return True

    def skip(self) -> None:
        """Discard the gradients, after `finite_on_all_ranks` has returned False.

        Raises:
            TooManySkips: on all ranks alike, if `limit` optimizer steps in a row have been skipped now.
        """
        here, anywhere = self._not_finite_here, self._not_finite_anywhere
        self.skipped += 1
        overflown = [name for name in self._engines if f"{name} gradient" in anywhere]
        if len(overflown) == len(anywhere) and all(searches_loss_scale(self._engines[name]) for name in overflown):
            for name in overflown:
                self._engines[name].step()  # finds the overflow, lowers the loss scale, and changes nothing else
        else:
            first = anywhere[0]
            self._count_skip(first, [rank for rank, names in enumerate(gather_objects(here)) if first in names])
        self.discard()

    def discard(self) -> None:
        """Discard losses and gradients: the next optimizer step is, bit for bit, as if they had not been computed."""
        for name, engine in self._engines.items():
            if name in self._accumulated:
                discard_gradients(engine)
        self._reset_sums()

    def _find_not_finite(self) -> tuple[list[str], list[str]]:
        """The losses, and then the gradients, that are not finite: on this rank, and on any rank."""
        sizes = {
            **self._losses,
            **{f"{name} gradient": engine.gradients.squares for name, engine in self._engines.items()},
        }
        flags = torch.stack([~size.isfinite() for size in sizes.values()]).double()
        here, anywhere = torch.stack([flags, global_sum(flags)]).tolist()
        return (
            [name for name, flag in zip(sizes, here) if flag],
            [name for name, flag in zip(sizes, anywhere) if flag],
        )

    def _reset_sums(self) -> None:
        self._losses, self._accumulated = {}, set()
        for engine in self._engines.values():
            engine.gradients.squares.zero_()

    def _count_skip(self, name: str, ranks: list[int]) -> None:
        self.consecutive_skips += 1
        problem = f"the {name} on rank {', '.join(map(str, ranks))} is not finite"
        say(f"warning: {problem}: this optimizer step is skipped, {self.consecutive_skips} in a row now")
        if self.consecutive_skips >= self._limit:
            raise TooManySkips(problem, self._limit)


def searches_loss_scale(engine: Engine) -> bool:
    """Whether the engine trains in fp16 and can still lower its loss scale, so that gradients overflow no more."""
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    return engine.fp16_enabled() and scaler.dynamic and scaler.cur_scale > scaler.min_scale
