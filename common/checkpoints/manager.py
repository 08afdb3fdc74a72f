"""Exact resume: a run that was interrupted goes on as if it had not been.

A checkpoint holds the engines with their optimizers and schedules (DeepSpeed's files), every rank's random state, and
state.json: how far the run was, the values of `TrainingState.state_dict`, where the metrics ended, and the
configuration. Data order and rollouts follow from the seed and the number of steps done, so they are not saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save

from common.checkpoints.completed import CompletedRun
from common.checkpoints.config_changes import batches_of_all_ranks, check_unchanged, plain_config
from common.checkpoints.engine_state import save_engine
from common.checkpoints.loading import load, naming_checkpoint, random_state
from common.checkpoints.reshard import load_resharded
from common.checkpoints.shard_writer import Shards
from common.checkpoints.state import FORMAT, STATE, rank_file, read_state, state_problems
from common.checkpoints.store import CheckpointStore, NotSaved
from common.checkpoints.training_state import RunLog, TrainingState
from common.config.groups import RunOptions
from common.errors import AlreadyComplete, Diverged, UserError
from common.runtime.distributed import gather_objects, is_main, rank, say, world_size
from common.runtime.heartbeat import set_phase
from common.runtime.program import stop_agreed
from common.runtime.signals import Stopped

DIRECTORY = "checkpoints"


class Checkpoints:
    """Saves the state of a run at intervals, and restores it at the start of the next one.

    Args:
        config: of the step.
        data: keys of the prepared data; a run with other data is another run.
        pieces: names of what the run is made of besides its options, such as {"task": "step1_sft.task.SFTTask"}; a
            run with others is another run.
    """

    def __init__(self, config: RunOptions, data: Sequence[str], pieces: Mapping[str, str] | None = None):
        self.config, self.data, self.pieces = config, list(data), pieces or {}
        self.store = CheckpointStore(Path(config.output_dir) / DIRECTORY, config.keep_checkpoints, state_problems)
        self.last_saved_at = 0  # optimizer steps at the last save
        self.last_good_step = 0  # the last step that was not skipped; training has not gone on from it yet
        self.saved: tuple[int, Path | None] = (-1, None)  # the newest checkpoint, and the step that it was taken after
        self.unconfirmed: Path | None = None  # a checkpoint that training has not gone on from yet
        self._restored: tuple[TrainingState, RunLog] | None = None

    def find(self) -> Path | None:
        """The checkpoint to go on from, if there is one. Loads none of its state. All ranks must call it.

        Raises:
            AlreadyComplete: the output directory holds the result of this command.
            UserError: the checkpoint of `--resume PATH` is damaged, or the checkpoint has another format, or is of a
                run with another configuration.
        """
        resume = self.config.resume
        if resume == "never":
            self._set_aside()
            return None
        self.store.clean()
        if resume == "auto":
            path = self.store.newest_whole(say)
            if path is None:
                self._check_not_completed()
                self._set_aside(damaged=True)
        else:
            path = Path(resume)
            if problems := self.store.problems(path):
                raise UserError(f"--resume {resume}: {problems[0]}: name a whole checkpoint, or --resume auto")
        if path is not None:
            check_unchanged(self.config, self.data, self.pieces, read_state(path), path)
        return path

    def restore(self, path: Path | None, state: TrainingState, tracker: RunLog) -> int:
        """Load the checkpoint at `path`, if there is one, into `state`.

        Returns:
            The steps (in step 3 iterations) that the checkpoint was taken after, or 0.
        """
        self._restored = state, tracker
        if is_main():
            self._completed_run().clear()
        if path is None:
            tracker.begin()
            return 0
        values = read_state(path)
        self.saved = values["step"], path
        if values["world_size"] == world_size():
            load(path, state)
        else:
            load_resharded(path, state, values, self.store, self.config.seed)
        with naming_checkpoint(path):
            state.load_state_dict(values["state_dict"])
        tracker.begin(values["tracker"])
        self.last_saved_at, self.last_good_step = values["optimizer_steps"], values["step"]
        say(f"resuming from {path}")
        return values["step"]

    def on_step_end(self, step: int, optimizer_steps: int | None = None) -> None:
        """Save if a checkpoint is due after `step`. If the disk refuses, that is reported and the run goes on.

        Args:
            optimizer_steps: made so far, where a step (an iteration of step 3) has several.

        Raises:
            Stopped: the run was asked to stop; its state is saved first, unless the last step was skipped.
            TrainingFailure: the output directory has gone.
        """
        state, tracker = self._running()
        interval, done = self.config.save_interval, step if optimizer_steps is None else optimizer_steps
        reason = stop_agreed(tracker.lost())
        if state.last_step_applied():
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

    def saved_value(self, path: Path | None, name: str) -> Any:
        """A value of `TrainingState.state_dict` in the checkpoint at `path`; None if there is none."""
        return None if path is None else read_state(path)["state_dict"].get(name)

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
            raise Diverged(
                f"{failure}; "
                + (
                    f"the last good checkpoint is {good}: go on from it with other settings and --resume {good} "
                    "--resume_anyway"
                    if good
                    else "there is no checkpoint from before"
                )
            ) from None

    def discard(self) -> None:
        """Record that the run is complete, and delete its checkpoints. The result must be published already."""
        if is_main():
            self._completed_run().record()
        self.store.delete()

    def _running(self) -> tuple[TrainingState, RunLog]:
        if self._restored is None:
            raise RuntimeError("Checkpoints.restore must be called before anything is saved")
        return self._restored

    def _completed_run(self) -> CompletedRun:
        return CompletedRun(self.config, self.data, self.pieces)

    def _check_not_completed(self) -> None:
        completed = self._completed_run()
        completed.check_format()
        if gather_objects(completed.exists() if is_main() else None)[0]:  # all ranks decide alike
            for note in completed.notes():
                say(f"note: {note}")
            raise AlreadyComplete(
                f"{self.config.output_dir} holds the result of this command already; --resume never trains it again"
            )

    def _how_to_go_on(self) -> str:
        if self.saved[1] is None:
            return "there is no checkpoint; the same command starts anew"
        return (
            f"run the same command{' with --resume auto' if self.config.resume != 'auto' else ''} to go on from "
            f"{self.saved[1]}"
        )

    def _write(self, shards: Shards, step: int, optimizer_steps: int) -> None:
        state, tracker = self._running()
        for name, engine in state.engines.items():
            save_engine(engine, name, shards)
        tensors = {f"state.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.tensors().items()}
        shards.add(rank_file(rank()), lambda file: file.write(save({**tensors, **random_state()})))
        if is_main():
            values = {
                "format": FORMAT,
                "step": step,
                "optimizer_steps": optimizer_steps,
                "world_size": world_size(),
                "state_dict": state.state_dict(),
                "tracker": tracker.place(step),
                "data": self.data,
                "pieces": self.pieces,
                "config": plain_config(self.config),
                "batches": batches_of_all_ranks(self.config),
            }
            shards.add(STATE, lambda file: file.write(json.dumps(values, indent=1).encode()))

    def _set_aside(self, damaged: bool = False) -> None:
        """Rename the directory of checkpoints, so that the saves of this run, which starts anew, delete none of them.

        Args:
            damaged: the run starts anew because no checkpoint could be used, rather than because it was told to.
        """
        if is_main() and self.store.directory.is_dir() and (not damaged or any(self.store.directory.glob("step-*"))):
            number = 1
            while (aside := self.store.directory.with_name(f"{DIRECTORY}-{number}")).exists():
                number += 1
            self.store.directory.rename(aside)
            say(
                f"note: no checkpoint is whole, so the run starts anew: what there is of them is kept in {aside}"
                if damaged
                else f"note: the checkpoints of an earlier run are in {aside} now"
            )
