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

from common.errors import DIVERGED, Diverged
from common.runtime.distributed import gather_objects, global_sum, say
from common.training.engine import accumulate
from common.training.gradients import discard_gradients


class AtomicStep:
    """One optimizer step after another: `accumulate` for each engine, then `step` for each if everything is
    `finite_on_all_ranks`, else `skip`.

    Args:
        engines: by the name of their model.
        limit: so many steps skipped in a row end the run.

    Attributes:
        skipped: steps of the whole run that were not made, those of fp16's search for its loss scale among them.
        consecutive_skips: steps skipped since the last that was made; that search does not count.
    """

    def __init__(self, engines: dict[str, object], limit: int):
        self.skipped = self.consecutive_skips = 0
        self._engines, self._limit = engines, limit
        self._losses: dict[str, Tensor] = {}
        self._not_finite_here: list[str] = []
        self._not_finite_anywhere: list[str] = []

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "consecutive_skips": self.consecutive_skips}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.consecutive_skips = state["skipped"], state["consecutive_skips"]

    def last_step_applied(self) -> bool:
        """Whether the last step was made."""
        return not self.consecutive_skips

    def accumulate(self, name: str, loss: str, micro_batches: Iterable, loss_of: Callable) -> Tensor:
        """`engine.accumulate` for the engine called `name`; `loss` is what an error is to call its loss."""
        self._losses[loss] = accumulate(self._engines[name], micro_batches, loss_of)
        return self._losses[loss]

    def finite_on_all_ranks(self) -> bool:
        """Whether every loss and gradient that was accumulated is finite on all ranks; the same answer on each.

        If so the caller makes the step of every engine; else it must call `skip`.
        """
        self._not_finite_here, self._not_finite_anywhere = self._find_not_finite()
        if self._not_finite_anywhere:
            return False
        self._forget()
        self.consecutive_skips = 0
        return True

    def skip(self) -> None:
        """Discard what was accumulated, after `finite_on_all_ranks` was false.

        Raises:
            Diverged: on all ranks alike, if one more step in a row was skipped than may be.
        """
        here, somewhere = self._not_finite_here, self._not_finite_anywhere
        self.skipped += 1
        overflown = [name for name in self._engines if f"{name} gradient" in somewhere]
        if len(overflown) == len(somewhere) and all(map(searches_loss_scale, map(self._engines.get, overflown))):
            for name in overflown:
                self._engines[name].step()  # finds the overflow, lowers the loss scale, and changes nothing else
        else:
            first = somewhere[0]
            self._count(first, [rank for rank, names in enumerate(gather_objects(here)) if first in names])
        self.discard()

    def discard(self) -> None:
        """Forget all that was accumulated: the next step is, bit for bit, as if it had never been."""
        self._forget()
        for engine in self._engines.values():
            discard_gradients(engine)

    def _find_not_finite(self) -> tuple[list[str], list[str]]:
        """Names of losses, then of gradients: on this rank, and on any; the latter are the same on all ranks."""
        sizes = {
            **self._losses,
            **{f"{name} gradient": engine.gradients.squares for name, engine in self._engines.items()},
        }
        flags = torch.stack([~size.isfinite() for size in sizes.values()]).double()
        here, somewhere = torch.stack([flags, global_sum(flags)]).tolist()
        return tuple([name for name, flag in zip(sizes, flags) if flag] for flags in (here, somewhere))

    def _forget(self) -> None:
        self._losses = {}
        for engine in self._engines.values():
            engine.gradients.squares.zero_()

    def _count(self, what: str, ranks: list[int]) -> None:
        self.consecutive_skips += 1
        found = f"the {what} on rank {', '.join(map(str, ranks))} is not finite"
        say(f"warning: {found}: this optimizer step is skipped, {self.consecutive_skips} in a row now")
        if self.consecutive_skips >= self._limit:
            raise Diverged(
                f"{found}: optimizer steps skipped in a row reach --max_skipped_steps {self._limit}: {DIVERGED}"
            )


def searches_loss_scale(engine) -> bool:
    """Whether an overflow of this engine's gradients is one of fp16's, which a lower loss scale mends."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return engine.fp16_enabled() and scaler.dynamic and scaler.cur_scale > scaler.min_scale
