"""Exact resume: what a run needs to go on as if it had not been interrupted.

A checkpoint holds the engines with their optimizers and schedules (DeepSpeed's files), every rank's random state, and
one JSON file: how far the run was, what else it must remember, where its metrics file ended, and the configuration.
Data order and rollouts follow from the seed and the number of steps done, so they need no state of their own.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.checkpoint_store import CheckpointStore, NotSaved
from common.config import Config, options
from common.distributed import is_main, on_gpu, rank, say, world_size
from common.errors import Diverged, UserError
from common.tracking import Tracker

STATE = "state.json"
DIRECTORY = "checkpoints"

# What may differ between a run and its continuation: it changes nothing that is computed.
MAY_CHANGE = frozenset({
    "output_dir", "data_output_path", "timeout", "enable_tensorboard", "tensorboard_path", "trust_remote_code",
    "save_interval", "keep_checkpoints", "resume", "resume_anyway", "log_interval", "print_loss", "print_answers",
    "print_answers_interval", "enable_test_mode", "test_stop_step", "unpin_actor_parameters",
    "release_inference_cache", "max_skipped_steps", "max_kl", "max_reward", "min_reward"})


@dataclass
class TrainingState:
    """What a checkpoint holds besides files of DeepSpeed.

    Attributes:
        engines: by name; saved and loaded by DeepSpeed.
        tensors: by name, this rank's own tensors to be saved and, when resuming, written in place.
        remember: values for JSON; what `recall` gets back when resuming.
        steady: whether the last step was made; where it was skipped no checkpoint is taken, as the weights may be lost.
    """
    engines: dict[str, object]
    tensors: Callable[[], dict[str, torch.Tensor]] = dict
    remember: Callable[[], dict] = dict
    recall: Callable[[dict], None] = lambda values: None
    steady: Callable[[], bool] = lambda: True


class Checkpoints:
    """Saves the state of a run every so often, and restores it at the start.

    Args:
        config: has `output_dir`, `save_interval`, `keep_checkpoints`, `resume` and `resume_anyway`.
        data: the keys of the prepared data; other data is another run.
    """

    def __init__(self, config, data: Sequence[str]):
        self.config, self.data = config, list(data)
        self.store = CheckpointStore(Path(config.output_dir) / DIRECTORY, config.keep_checkpoints)
        self.state: TrainingState | None = None
        self.tracker: Tracker | None = None
        self.counted = 0  # optimizer steps at the last save
        self.reached = 0  # steps made well; the state after the last of them has not been trained from yet

    def find(self) -> Path | None:
        """The checkpoint to go on from, if there is one; none of its state is loaded yet. All ranks must call it.

        Raises:
            UserError: `--resume PATH` is not whole, or the run was started with another configuration.
        """
        resume = self.config.resume
        if resume == "never":
            self._set_aside()
            return None
        self.store.clean()
        if resume == "auto":
            path = self.store.newest_whole(say)
        else:
            path = Path(resume)
            if problems := self.store.problems(path):
                raise UserError(f"--resume {resume}: {problems[0]}: name a whole checkpoint, or --resume auto")
        if path is not None:
            self._check_config(_read_state(path), path)
        return path

    def restore(self, path: Path | None, state: TrainingState, tracker: Tracker) -> int:
        """Load `path`, or nothing, into `state`; returns the steps (iterations in step 3) that it was taken after."""
        self.state, self.tracker = state, tracker
        if path is None:
            tracker.begin()
            return 0
        values = _read_state(path)
        for name, engine in state.engines.items():
            load_engine(engine, path / name)
        tensors = load_file(path / f"rank{rank()}.safetensors")
        for name, tensor in state.tensors().items():
            tensor.copy_(tensors[f"state.{name}"])
        _set_random_state(tensors)
        state.recall(values["remember"])
        tracker.begin(values["tracker"])
        self.counted, self.reached = values["optimizer_steps"], values["step"]
        say(f"resuming from {path}")
        return values["step"]

    def after(self, step: int, optimizer_steps: int | None = None) -> None:
        """Save if it is due after `step`. A disk that refuses is reported, and the run goes on.

        Args:
            optimizer_steps: done so far, where a step (an iteration of step 3) has several.
        """
        if not self.state.steady():
            return
        self.reached = step
        self.store.prune()  # training has gone on well from the newest
        interval, done = self.config.save_interval, step if optimizer_steps is None else optimizer_steps
        if interval and done // interval > self.counted // interval:
            self.save(step, done)

    def save(self, step: int, optimizer_steps: int) -> None:
        """Save now."""
        try:
            path = self.store.save(step, lambda directory: self._write(directory, step, optimizer_steps))
            say(f"checkpoint saved to {path}")
        except NotSaved as failure:
            say(f"warning: {failure}; the run goes on and will try again")
        # After a failure too: not at every step from here on, but at the next interval.
        self.counted = optimizer_steps

    def remembered(self, path: Path | None, name: str):
        """A value of `TrainingState.remember` in the checkpoint to go on from; None where there is none."""
        return None if path is None else _read_state(path)["remember"].get(name)

    @contextmanager
    def naming_last_good(self) -> Iterator[None]:
        """Within the context a run that has diverged says which checkpoint is from before, and how to go on from it."""
        try:
            yield
        except Diverged as failure:
            good = self.store.newest_before(self.reached)
            raise Diverged(f"{failure}; " + (
                f"the last good checkpoint is {good}: go on from it with other settings and --resume {good} "
                "--resume_anyway" if good else "there is no checkpoint from before")) from None

    def discard(self) -> None:
        """Delete all checkpoints: the result is published."""
        self.store.delete()

    def _write(self, directory: Path, step: int, optimizer_steps: int) -> None:
        refusals = [refusal for name, engine in self.state.engines.items()
                    for refusal in save_engine(engine, directory / name)]
        tensors = {f"state.{name}": tensor.detach().cpu().contiguous() for name, tensor in self.state.tensors().items()}
        if refusals:
            raise refusals[0]
        save_file({**tensors, **_random_state()}, directory / f"rank{rank()}.safetensors")
        if is_main():
            values = {"step": step, "optimizer_steps": optimizer_steps, "world_size": world_size(),
                      "remember": self.state.remember(),
                      "tracker": self.tracker.place(step), "data": self.data, "config": _plain(self.config)}
            (directory / STATE).write_text(json.dumps(values, indent=1), encoding="utf-8")

    def _check_config(self, values: dict, path: Path) -> None:
        if values["world_size"] != world_size():
            raise UserError(f"{path} was made by {values['world_size']} ranks, and this run has {world_size()}: start "
                            "it with as many, or add --resume never to start anew")
        ours, theirs = _plain(self.config), values["config"]
        changes = [f"--{name} was {theirs.get(name)!r}, now {ours.get(name)!r}" for name in sorted({*ours, *theirs})
                   if name not in MAY_CHANGE and ours.get(name) != theirs.get(name)]
        if values["data"] != self.data and not changes:
            changes = ["the data has other rows, or is prepared in another way"]
        if changes and not self.config.resume_anyway:
            raise UserError(f"{path} was made with another configuration: {'; '.join(changes)}: run the same command "
                            "again, add --resume_anyway to go on with the new one, or --resume never to start anew")

    def _set_aside(self) -> None:
        if is_main() and self.store.directory.is_dir():
            number = 1
            while (aside := self.store.directory.with_name(f"{DIRECTORY}-{number}")).exists():
                number += 1
            self.store.directory.rename(aside)
            say(f"note: the checkpoints of an earlier run are in {aside} now")


def save_engine(engine, directory: Path) -> list[OSError]:
    """DeepSpeed's checkpoint of an engine, without frozen weights; returns what the disk refused to take.

    DeepSpeed's ranks wait for each other while they save, so no error may leave one of them early.
    """
    refusals: list[OSError] = []
    write = engine.checkpoint_engine.save

    def record(state_dict, path):
        try:
            write(state_dict, path)
        except OSError as error:
            refusals.append(error)
        except RuntimeError as error:  # of torch's own writer, where the disk is full
            refusals.append(OSError(str(error)))

    engine.checkpoint_engine.save = record
    try:
        engine.save_checkpoint(str(directory), tag="engine", save_latest=False, exclude_frozen_parameters=True)
    except OSError as error:
        refusals.append(error)
    finally:
        del engine.checkpoint_engine.save
    return refusals


def load_engine(engine, directory: Path) -> None:
    """Weights, optimizer and schedule as they were saved; frozen weights stay as they were loaded from the model."""
    found, _ = engine.load_checkpoint(str(directory), tag="engine", load_module_strict=False)
    if found is None:
        raise UserError(f"{directory} is no checkpoint of this model")


def _read_state(path: Path) -> dict:
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def _random_state() -> dict[str, torch.Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if on_gpu():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if on_gpu() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _plain(config: Config) -> dict:
    """The configuration as JSON has it, without what has no effect."""
    values = {name: getattr(config, name) for name, meta in options(type(config)).items() if not meta.ignored}
    return json.loads(json.dumps(values))
