"""Starts and ends a run: opens the output directory, joins the ranks, finds the checkpoint, reports the result."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.artifacts.lock import lock_output
from common.artifacts.obstacles import check_nothing_in_the_way
from common.artifacts.tracking import Tracker, quiet_libraries
from common.checkpoints.manager import Checkpoints
from common.checkpoints.saver import Saver
from common.checkpoints.training_state import TrainingState
from common.config.groups import RunOptions
from common.data.options import ProgramConfig
from common.data.prepare import PreparedData, agree_on
from common.errors import UserError, named_by
from common.runtime.distributed import is_main, rank, say
from common.runtime.program import start

if TYPE_CHECKING:  # it imports wandb, which only those need who ask for it
    from common.artifacts.wandb_run import WandbRun


@dataclass(frozen=True)
class Run:
    """A started run: its output directory is open, its ranks are connected, and all ranks have the same data.

    Attributes:
        checkpoint: the one to resume from, if there is one; it is not loaded yet.
    """

    tracker: Tracker
    checkpoints: Checkpoints
    checkpoint: Path | None

    def restore(self, state: TrainingState) -> Saver:
        """Load the checkpoint into `state`; returns what saves it from there on, and knows the steps that were done."""
        return self.checkpoints.restore(self.checkpoint, state, self.tracker)


def start_run(
    config: ProgramConfig, *data: PreparedData, parts: Sequence[str] = ("",), pieces: Mapping[str, object] | None = None
) -> Run:
    """Open the output directory, join the process group, and find the checkpoint to go on from. All ranks call it.

    The data must be prepared before, because that may take longer than the ranks' timeout. Engines are created
    afterwards, so that none is created for a run that is complete already.

    Args:
        data: all that the run reads; a checkpoint of other data is refused.
        parts: as of `open_run`.
        pieces: what decides the result and no option describes, such as {"task": task}: classes, functions or
            instances, or a text, such as a checksum. A run with a piece of another `name_of` is another run.

    Raises:
        AlreadyComplete: the output directory holds the result of this command.
        UserError: see `open_run`; or ranks have prepared different data, or the checkpoint is of another run.
    """
    tracker = open_run(config, parts)
    start(config.timeout, config.seed)
    agree_on(*data)
    names = {what: name_of(piece) for what, piece in (pieces or {}).items()}
    checkpoints = Checkpoints(config, [item.key for item in data], names)
    return Run(tracker, checkpoints, checkpoints.find())


def name_of(piece: object) -> str:
    """Module and qualified name of a class or a function, or of an instance's class: "step1_sft.task.SFTTask". A text
    is its own name.

    In a program that is run as a file, that file's name stands for the module, which Python calls __main__.
    """
    if isinstance(piece, str):
        return piece
    while isinstance(piece, partial):
        piece = piece.func
    named = piece if hasattr(piece, "__qualname__") else type(piece)
    module = named.__module__
    if module == "__main__":
        module = Path(getattr(sys.modules[module], "__file__", None) or module).stem
    return f"{module}.{named.__qualname__}"


def open_run(config: RunOptions, parts: Sequence[str] = ("",)) -> Tracker:
    """Create the output directory and send the libraries' messages to its logs.

    Call it after all checks. The libraries' logs of an earlier run in the directory are continued; its metrics and
    samples are replaced when the tracker begins; its models stay until `publishing`.

    Args:
        parts: the directories inside it that will hold models; "" is the output directory itself.

    Raises:
        UserError: another run has locked the directory, a path in it has the wrong kind, it cannot be written to, or
            W&B is wanted and cannot be used.
    """
    output = Path(config.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with named_by("--output_dir"):
            check_nothing_in_the_way(output, parts, rank())
            if is_main():
                lock_output(output)
        if is_main():
            open(output / "logs" / "metrics.jsonl", "ab").close()
        quiet_libraries(output)
    except OSError as error:
        raise UserError(
            f"--output_dir {output}: {error.filename or output} cannot be written: {error.strerror}: make "
            "it writable, or choose another directory"
        ) from error
    for note in config.notes:
        say(f"note: {note}")
    return Tracker(output, config.writes_tensorboard, config.tensorboard_path, _wandb_run(config, output))


def _wandb_run(config: RunOptions, output: Path) -> WandbRun | None:
    """The W&B run, on rank 0, if it is wanted; nothing is sent yet."""
    if "wandb" not in config.report_to or not is_main():
        return None
    from common.artifacts.wandb_run import WandbRun, check_usable, without_secrets

    with named_by("--report_to"):
        check_usable()
    return WandbRun(output / "logs", config.run_name, without_secrets(config))


def say_data(data: PreparedData) -> None:
    """Print how many rows were read, were unusable, and remain for training."""
    for line in data.report.lines():
        say(line)


def report_done(tracker: Tracker, steps: int, metrics: dict[str, float], output_dir: str) -> None:
    """Record the final metrics, close the tracker, and print where the result is."""
    tracker.log("done", steps, metrics)
    tracker.close()
    say(f"saved to {output_dir}")
