"""Saves and restores the state of a run, so that an interrupted run continues exactly as if never interrupted.

A checkpoint holds the engines with their optimizers and schedules (DeepSpeed's files), every rank's random state, and
state.json: the number of steps done, the values of `TrainingState.state_dict`, the position in the metrics file, and
the configuration. Data order and rollouts follow from the seed and the number of steps done, so they are not saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.checkpoints.completed import CompletedRun
from common.checkpoints.config_changes import batches_of_all_ranks, check_unchanged, plain_config
from common.checkpoints.errors import CheckpointError
from common.checkpoints.loading import load, naming_checkpoint
from common.checkpoints.reshard import load_resharded
from common.checkpoints.saver import Saver
from common.checkpoints.state import FORMAT, read_state, state_problems
from common.checkpoints.store import CheckpointStore
from common.checkpoints.training_state import RunLog, TrainingState
from common.config.groups import RunOptions
from common.errors import AlreadyComplete, UserError
from common.runtime.distributed import gather_objects, is_main, say, world_size

DIRECTORY = "checkpoints"


class Checkpoints:
    """Which checkpoint a run goes on from, and its state restored. A `Saver` makes further ones.

    Args:
        config: of the step.
        data: keys of the prepared data; a run with other data is another run.
        pieces: names of what the run is made of besides its options, such as {"task": "step1_sft.task.SFTTask"}; a
            run with others is another run.
    """

    def __init__(self, config: RunOptions, data: Sequence[str], pieces: Mapping[str, str] | None = None):
        self.config, self.data, self.pieces = config, list(data), pieces or {}
        self.store = CheckpointStore(Path(config.output_dir) / DIRECTORY, config.keep_checkpoints, state_problems)

    def find(self) -> Path | None:
        """Find the checkpoint to resume from, if there is one, without loading it. All ranks must call it.

        Raises:
            AlreadyComplete: the output directory holds the result of this command.
            UserError: the checkpoint of `--resume PATH` is damaged, or the checkpoint has another format, or is of a
                run with another configuration.
        """
        if self.config.resume == "never":
            self._set_aside()
            return None
        self.store.clean()
        with self._advising():
            path = self._newest() if self.config.resume == "auto" else self._named()
            if path is not None:
                check_unchanged(self.config, self.data, self.pieces, read_state(path), path)
        return path

    def restore(self, path: Path | None, state: TrainingState, tracker: RunLog) -> Saver:
        """Load the checkpoint at `path`, if there is one, into `state`; returns what saves the run from there on.

        Raises:
            UserError: the checkpoint does not fit this run.
        """
        if is_main():
            self._completed_run().clear()
        if path is None:
            tracker.begin()
            return Saver(self.config, self.store, self._identity(), state, tracker)
        with self._advising():
            values = read_state(path)
            if values["world_size"] == world_size():
                load(path, state)
            else:
                load_resharded(path, state, values, self.store, self.config.seed)
            with naming_checkpoint(path):
                state.load_state_dict(values["state_dict"])
        tracker.begin(values["tracker"])
        say(f"resuming from {path}")
        saved = values["step"], path
        return Saver(self.config, self.store, self._identity(), state, tracker, saved, values["optimizer_steps"])

    def saved_value(self, path: Path | None, name: str) -> Any:
        """A value of `TrainingState.state_dict` in the checkpoint at `path`; None if there is none."""
        return None if path is None else read_state(path)["state_dict"].get(name)

    def discard(self) -> None:
        """Record that the run is complete, and delete its checkpoints. The result must be published already."""
        if is_main():
            self._completed_run().record()
        self.store.delete()

    @contextmanager
    def _advising(self) -> Iterator[None]:
        """Within the context, the error of a checkpoint says how to go on without it."""
        try:
            yield
        except CheckpointError as error:
            cure = f"{error.cure}, or " if error.cure else ""
            raise UserError(
                f"{error}: {cure}go on from another checkpoint, --resume PATH, or start anew, --resume never"
            ) from error.__cause__

    def _newest(self) -> Path | None:
        """The newest whole checkpoint, if there is one."""
        path = self.store.newest_whole(say)
        if path is None:
            self._check_not_completed()
            self._set_aside(damaged=True)
        return path

    def _named(self) -> Path:
        """The checkpoint that --resume names. Raises UserError if it is not whole."""
        path = Path(self.config.resume)
        if problems := self.store.problems(path):
            raise UserError(f"--resume {self.config.resume}: {problems[0]}: name a whole checkpoint, or --resume auto")
        return path

    def _identity(self) -> dict[str, Any]:
        """The fields of state.json that say which run this is."""
        return {
            "format": FORMAT,
            "world_size": world_size(),
            "data": self.data,
            "pieces": self.pieces,
            "config": plain_config(self.config),
            "batches": batches_of_all_ranks(self.config),
        }

    def _completed_run(self) -> CompletedRun:
        return CompletedRun(self.config, self.data, self.pieces)

    def _check_not_completed(self) -> None:
        completed = self._completed_run()
        completed.check_format()
        if gather_objects(completed.exists() if is_main() else None)[0]:  # all ranks decide alike
            for note in completed.notes():
                say(f"note: {note}")
            raise AlreadyComplete(
                f"{self.config.output_dir} holds the result of this command already; give --resume never to train it "
                "again"
            )

    def _set_aside(self, damaged: bool = False) -> None:
        """Rename the directory of checkpoints, so that this run, which starts anew, does not delete them when it saves.

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
