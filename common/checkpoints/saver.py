"""A run that has begun saves its state: at intervals, and when it is told to stop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save

from common.checkpoints.engine_state import save_engine
from common.checkpoints.loading import random_state
from common.checkpoints.shard_writer import Shards
from common.checkpoints.state import STATE, rank_file
from common.checkpoints.store import CheckpointStore, NotSaved
from common.checkpoints.training_state import RunLog, TrainingState
from common.config.groups import RunOptions
from common.errors import Diverged, TooManySkips
from common.runtime.distributed import is_main, rank, say
from common.runtime.heartbeat import set_phase
from common.runtime.program import stop_agreed
from common.runtime.signals import Stopped


class Saver:
    """Saves the state of a run at intervals. `Checkpoints.restore` makes it, once the state is that to go on from.

    Args:
        identity: the fields of state.json that say which run this is.
        saved: the newest checkpoint, and the step that it was taken after; -1 and None before there is one.
        optimizer_steps: made so far.

    Attributes:
        steps_done: the steps (in step 3 iterations) that were done when the run began; 0 for a new run.
    """

    def __init__(
        self,
        config: RunOptions,
        store: CheckpointStore,
        identity: Mapping[str, Any],
        state: TrainingState,
        tracker: RunLog,
        saved: tuple[int, Path | None] = (-1, None),
        optimizer_steps: int = 0,
    ):
        self.config, self.store, self.identity, self.state, self.tracker = config, store, identity, state, tracker
        self.saved = saved
        self.steps_done = max(saved[0], 0)
        self.last_saved_at = optimizer_steps  # optimizer steps at the last save
        self.last_good_step = self.steps_done  # the last that was not skipped; training has not gone on from it yet
        self.unconfirmed: Path | None = None  # a checkpoint that training has not gone on from yet

    def on_step_end(self, step: int, optimizer_steps: int | None = None) -> None:
        """Save if a checkpoint is due after `step`. If the disk refuses, that is reported and the run goes on.

        Args:
            optimizer_steps: made so far, where a step (an iteration of step 3) has several.

        Raises:
            Stopped: the run was asked to stop; its state is saved first, unless the last step was skipped.
            TrainingFailure: the output directory has gone.
        """
        interval, done = self.config.save_interval, step if optimizer_steps is None else optimizer_steps
        lost = self.tracker.lost()
        reason = stop_agreed(lost and f"--output_dir {lost}")
        if self.state.last_step_applied():
            self.last_good_step = step
            if self.unconfirmed is not None:  # training has gone on well from it
                self.store.prune(self.unconfirmed)
                self.unconfirmed = None
            if interval and (done // interval > self.last_saved_at // interval or (reason and self.saved[0] != step)):
                self.save(step, done)
        if reason:
            raise Stopped(
                f"stopped by {reason} after {step} "
                f"{'steps' if optimizer_steps is None else 'iterations'}: {self._how_to_go_on()}"
            )

    def save(self, step: int, optimizer_steps: int) -> None:
        """Save now."""
        set_phase("saving")
        try:
            path = self.store.save(step, lambda shards: self._write(shards, step, optimizer_steps))
            self.saved, self.unconfirmed = (step, path), path
            say(f"checkpoint saved to {path}")
        except NotSaved as failure:
            say(f"warning: {failure}; the run goes on and will try again")
        # After a failure too: the next attempt is made at the next interval, not after every step from here on.
        self.last_saved_at = optimizer_steps

    @contextmanager
    def reporting_last_good(self) -> Iterator[None]:
        """Within the context the error of a run that diverged names the last checkpoint from before, and how to use it.

        Raises:
            Diverged: with the longer message.
        """
        try:
            yield
        except Diverged as failure:
            good = self.store.newest_before(self.last_good_step)
            limit = f"; --max_skipped_steps {failure.limit} allows no more" if isinstance(failure, TooManySkips) else ""
            how_to_go_on = (
                f"the last good checkpoint is {good}: go on from it with other settings and --resume {good} "
                "--resume_anyway"
                if good
                else "there is no checkpoint from before"
            )
            raise Diverged(f"{failure}{limit}; {how_to_go_on}") from None

    def _how_to_go_on(self) -> str:
        if self.saved[1] is None:
            return "there is no checkpoint; the same command starts anew"
        return (
            f"run the same command{' with --resume auto' if self.config.resume != 'auto' else ''} to go on from "
            f"{self.saved[1]}"
        )

    def _write(self, shards: Shards, step: int, optimizer_steps: int) -> None:
        for name, engine in self.state.engines.items():
            save_engine(engine, name, shards)
        tensors = {f"state.{name}": tensor.detach().cpu().contiguous() for name, tensor in self.state.tensors().items()}
        shards.add(rank_file(rank()), lambda file: file.write(save({**tensors, **random_state()})))
        if is_main():
            values = {
                **self.identity,
                "step": step,
                "optimizer_steps": optimizer_steps,
                "state_dict": self.state.state_dict(),
                "tracker": self.tracker.place(step),
            }
            shards.add(STATE, lambda file: file.write(json.dumps(values, indent=1).encode()))
