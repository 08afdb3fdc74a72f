"""Optimizer steps that all engines of a run make together, or none of them.

A loss or a gradient that is not finite, of one model on one rank, would reach the weights of all ranks, and through the
next rollout the other model. So nothing steps before all ranks know that everything was finite; else all gradients are
dropped, and weights, optimizer states and learning-rate schedules stay what they were, bit for bit.

The price: the gradients of all engines are held at once, those of the first while the others compute theirs.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from common.runtime.distributed import gather_objects, global_sum, say
from common.training.engine import accumulate
from common.errors import DIVERGED, Diverged
from common.training.gradients import discard_gradients


class JointStep:
    """One optimizer step after another: `accumulate` for each engine, and if they have `agreed`, `step` for each.

    Args:
        engines: by the name of their model.
        limit: so many steps skipped in a row end the run.

    Attributes:
        skipped: steps of the whole run that were not made, those of fp16's search for its loss scale among them.
        in_a_row: steps skipped since the last that was made; that search does not count.
    """

    def __init__(self, engines: dict[str, object], limit: int):
        self.skipped = self.in_a_row = 0
        self._engines, self._limit = engines, limit
        self._losses: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def steady(self) -> bool:
        """Whether the last step was made."""
        return not self.in_a_row

    def accumulate(self, name: str, loss: str, micro_batches: Iterable, loss_of: Callable) -> Tensor:
        """`common.training.engine.accumulate` for the engine called `name`; `loss` is what an error is to call its loss."""
        self._losses[loss] = accumulate(self._engines[name], micro_batches, loss_of)
        return self._losses[loss]

    def agreed(self) -> bool:
        """Whether all that was accumulated is finite on all ranks, so that every engine is to step; else it is dropped.

        Raises:
            Diverged: on all ranks alike, if one more step in a row was skipped than may be.
        """
        here, somewhere = self._not_finite()
        if not somewhere:
            self._forget()
            self.in_a_row = 0
            return True
        self.skipped += 1
        overflown = [name for name in self._engines if f"{name} gradient" in somewhere]
        if len(overflown) == len(somewhere) and all(map(searches_loss_scale, map(self._engines.get, overflown))):
            for name in overflown:
                self._engines[name].step()  # finds the overflow, lowers the loss scale, and changes nothing else
        else:
            first = somewhere[0]
            self._count(first, [rank for rank, names in enumerate(gather_objects(here)) if first in names])
        self.drop()
        return False

    def drop(self) -> None:
        """Forget all that was accumulated: the next step is, bit for bit, as if it had never been."""
        self._forget()
        for engine in self._engines.values():
            discard_gradients(engine)

    def _not_finite(self) -> tuple[list[str], list[str]]:
        """Names of losses, then of gradients: on this rank, and on any; the latter are the same on all ranks."""
        sizes = {**self._losses,
                 **{f"{name} gradient": engine.gradients.squares for name, engine in self._engines.items()}}
        flags = torch.stack([~size.isfinite() for size in sizes.values()]).double()
        here, somewhere = torch.stack([flags, global_sum(flags)]).tolist()
        return tuple([name for name, flag in zip(sizes, flags) if flag] for flags in (here, somewhere))

    def _forget(self) -> None:
        self._losses = {}
        for engine in self._engines.values():
            engine.gradients.squares.zero_()

    def _count(self, what: str, ranks: list[int]) -> None:
        self.in_a_row += 1
        found = f"the {what} on rank {', '.join(map(str, ranks))} is not finite"
        say(f"warning: {found}: this optimizer step is skipped, {self.in_a_row} in a row now")
        if self.in_a_row >= self._limit:
            raise Diverged(f"{found}: optimizer steps skipped in a row reach --max_skipped_steps {self._limit}: "
                           f"{DIVERGED}")


def searches_loss_scale(engine) -> bool:
    """Whether an overflow of this engine's gradients is one of fp16's, which a lower loss scale mends."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return engine.fp16_enabled() and scaler.dynamic and scaler.cur_scale > scaler.min_scale
