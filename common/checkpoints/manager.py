"""Exact resume: what a run needs to go on as if it had not been interrupted.

A checkpoint holds the engines with their optimizers and schedules (DeepSpeed's files), every rank's random state, and
one JSON file: how far the run was, what else it must remember, where its metrics file ended, and the configuration.
Data order and rollouts follow from the seed and the number of steps done, so they need no state of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from common.artifacts.tracking import Tracker
from common.checkpoints.completed import CompletedRun
from common.checkpoints.engine_state import load_engine, save_engine
from common.checkpoints.reshard import loading_universal, make_universal
from common.checkpoints.shard_writer import Shards
from common.checkpoints.state import RANDOM_STATE, STATE, rank_file, read_state, state_problems
from common.checkpoints.store import CheckpointStore, NotSaved
from common.config.parser import Config, options
from common.errors import AlreadyComplete, Diverged, UserError, reason_of
from common.runtime.distributed import barrier, gather_objects, is_main, on_gpu, rank, say, seed_rank, world_size
from common.runtime.heartbeat import set_phase
from common.runtime.program import stop_agreed
from common.runtime.signals import Stopped
from common.training.atomic_step import AtomicStep
from common.training.engine import read_override

DIRECTORY = "checkpoints"

# What may differ between a run and its continuation: it changes nothing that is computed.
MAY_CHANGE = frozenset(
    {
        "output_dir",
        "data_output_path",
        "timeout",
        "enable_tensorboard",
        "tensorboard_path",
        "trust_remote_code",
        "save_interval",
        "keep_checkpoints",
        "resume",
        "resume_anyway",
        "log_interval",
        "print_loss",
        "print_answers",
        "print_answers_interval",
        "enable_test_mode",
        "test_stop_step",
        "release_inference_cache",
        "offload_in_rollouts",
        "max_skipped_steps",
        "max_kl",
        "max_reward",
        "min_reward",
    }
)

# What may differ too, though the result has more or fewer figures of it: evaluation draws on no random numbers of
# training, and takes no part in it.
ONLY_EVALUATES = frozenset({"eval_interval", "eval_iters", "eval_prompts", "per_device_eval_batch_size"})
STOPS_EARLY = {"enable_test_mode", "test_stop_step"}  # what has ended otherwise has another result


@dataclass
class TrainingState:
    """What a checkpoint holds besides files of DeepSpeed.

    Attributes:
        engines: by name; saved and loaded by DeepSpeed.
        tensors: by name, this rank's own tensors to be saved and, when resuming, written in place.
        reshape: takes the tensors over from another number of ranks; it gets a function from a name to those of all.
        state_dict: values for JSON; what `load_state_dict` gets back when resuming.
        last_step_applied: whether the last step was made; where it was skipped no checkpoint is taken, as the
            weights may be lost.
    """

    engines: dict[str, object]
    tensors: Callable[[], dict[str, torch.Tensor]] = dict
    reshape: Callable[[Callable[[str], list[torch.Tensor]]], None] = lambda parts_of: None
    state_dict: Callable[[], dict] = dict
    load_state_dict: Callable[[dict], None] = lambda values: None
    last_step_applied: Callable[[], bool] = lambda: True

    @classmethod
    def of_one_engine(cls, engine, step: AtomicStep, **remembered) -> TrainingState:
        """That of steps 1 and 2: the engine, what its steps count, and values that stay."""
        return cls(
            {"model": engine},
            state_dict=lambda: {**step.state_dict(), **remembered},
            load_state_dict=step.load_state_dict,
            last_step_applied=step.last_step_applied,
        )


class Checkpoints:
    """Saves the state of a run every so often, and restores it at the start.

    Args:
        config: has `output_dir`, `save_interval`, `keep_checkpoints`, `resume` and `resume_anyway`.
        data: the keys of the prepared data; other data is another run.
    """

    def __init__(self, config, data: Sequence[str]):
        self.config, self.data = config, list(data)
        self.store = CheckpointStore(Path(config.output_dir) / DIRECTORY, config.keep_checkpoints, state_problems)
        self.state: TrainingState | None = None
        self.tracker: Tracker | None = None
        self.last_saved_at = 0  # optimizer steps at the last save
        self.last_good_step = 0  # steps made well; the state after the last of them has not been trained from yet
        self.saved: tuple[int, Path | None] = (-1, None)  # the newest checkpoint, and the step that it was taken after
        self.unconfirmed: Path | None = None  # one that training has not gone on from yet

    def find(self) -> Path | None:
        """The checkpoint to go on from, if there is one; none of its state is loaded yet. All ranks must call it.

        Raises:
            AlreadyComplete: the run has ended well already.
            UserError: `--resume PATH` is not whole, or the run was started with another configuration.
        """
        resume = self.config.resume
        if resume == "never":
            self._set_aside()
            return None
        self.store.clean()
        if resume == "auto":
            path = self.store.newest_whole(say)
            if path is None:
                there = gather_objects(self._completed_run().exists() if is_main() else None)[0]  # all ranks do as one
                if there:
                    raise AlreadyComplete(
                        f"{self.config.output_dir} holds the result of this command already; --resume never "
                        "trains it again"
                    )
                self._set_aside(damaged=True)
        else:
            path = Path(resume)
            if problems := self.store.problems(path):
                raise UserError(f"--resume {resume}: {problems[0]}: name a whole checkpoint, or --resume auto")
        if path is not None:
            self._check_config(read_state(path), path)
        return path

    def restore(self, path: Path | None, state: TrainingState, tracker: Tracker) -> int:
        """Load `path`, or nothing, into `state`; returns the steps (iterations in step 3) that it was taken after."""
        self.state, self.tracker = state, tracker
        if is_main():
            self._completed_run().clear()
        if path is None:
            tracker.begin()
            return 0
        values = read_state(path)
        self.saved = values["step"], path
        if values["world_size"] == world_size():
            self._load(path)
        else:
            self._load_reshaped(path, values)
        with _fitting(path):
            state.load_state_dict(values["state_dict"])
        tracker.begin(values["tracker"])
        self.last_saved_at, self.last_good_step = values["optimizer_steps"], values["step"]
        say(f"resuming from {path}")
        return values["step"]

    def on_step_end(self, step: int, optimizer_steps: int | None = None) -> None:
        """Save if it is due after `step`. A disk that refuses is reported, and the run goes on.

        Args:
            optimizer_steps: done so far, where a step (an iteration of step 3) has several.

        Raises:
            Stopped: the run was told to stop; it is saved, where it may be.
            TrainingFailure: the output directory has gone.
        """
        interval, done = self.config.save_interval, step if optimizer_steps is None else optimizer_steps
        reason = stop_agreed(self.tracker.lost())
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
        # After a failure too: not at every step from here on, but at the next interval.
        self.last_saved_at = optimizer_steps

    def saved_value(self, path: Path | None, name: str):
        """A value of `TrainingState.remember` in the checkpoint to go on from; None where there is none."""
        return None if path is None else read_state(path)["state_dict"].get(name)

    @contextmanager
    def reporting_last_good(self) -> Iterator[None]:
        """Within the context a run that has diverged says which checkpoint is from before, and how to go on from it."""
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
        """Delete all checkpoints: the result is published."""
        if is_main():
            self._completed_run().record()
        self.store.delete()

    def _completed_run(self) -> CompletedRun:
        config = {name: value for name, value in _plain(self.config).items() if name not in MAY_CHANGE - STOPS_EARLY}
        for batch in self.config.batches():  # what they make on all ranks together is what counts
            for flag in batch.flags:
                config.pop(flag, None)
        return CompletedRun(self.config, {"config": config, "batches": _batches(self.config), "data": self.data})

    def _how_to_go_on(self) -> str:
        if self.saved[1] is None:
            return "there is no checkpoint; the same command starts anew"
        return (
            f"run the same command{' with --resume auto' if self.config.resume != 'auto' else ''} to go on from "
            f"{self.saved[1]}"
        )

    def _load(self, path: Path) -> None:
        for name, engine in self.state.engines.items():
            load_engine(engine, path / name)
        with _fitting(path):
            tensors = load_file(path / rank_file(rank()))
            for name, tensor in self.state.tensors().items():
                tensor.copy_(tensors[f"state.{name}"])
            _set_random_state(tensors)

    def _load_reshaped(self, path: Path, values: dict) -> None:
        """From another number of ranks: ZeRO's shards are cut anew, what is whole on every rank is taken as it is."""
        sharded = [name for name, engine in self.state.engines.items() if engine.zero_optimization()]
        whole = self.store.scratch()
        make_universal(path, whole, sharded)
        for name, engine in self.state.engines.items():
            if name in sharded:
                with loading_universal(engine):
                    load_engine(engine, whole / name)
            else:
                load_engine(engine, path / name)
        barrier()  # every rank has read
        self.store.clean()
        files = [safe_open(path / rank_file(number), "pt") for number in range(values["world_size"])]
        with _fitting(path):
            self.state.reshape(lambda name: [file.get_tensor(f"state.{name}") for file in files])
        seed_rank(self.config.seed + values["step"] * world_size())
        say(
            f"note: {path} was made by {_ranks(values['world_size'])}, and this run has {world_size()}: the same "
            "batches follow, and numbers that agree but for rounding; dropout, if there is any, is drawn anew"
        )

    def _write(self, shards: Shards, step: int, optimizer_steps: int) -> None:
        for name, engine in self.state.engines.items():
            save_engine(engine, name, shards)
        tensors = {f"state.{name}": tensor.detach().cpu().contiguous() for name, tensor in self.state.tensors().items()}
        shards.add(rank_file(rank()), lambda file: file.write(save({**tensors, **_random_state()})))
        if is_main():
            values = {
                "step": step,
                "optimizer_steps": optimizer_steps,
                "world_size": world_size(),
                "state_dict": self.state.state_dict(),
                "tracker": self.tracker.place(step),
                "data": self.data,
                "config": _plain(self.config),
                "batches": _batches(self.config),
            }
            shards.add(STATE, lambda file: file.write(json.dumps(values, indent=1).encode()))

    def _check_config(self, values: dict, path: Path) -> None:
        ours, theirs, may_change = _plain(self.config), values["config"], {*MAY_CHANGE, *ONLY_EVALUATES}
        if values["world_size"] != world_size():
            self._check_batches(values, path)
            may_change.update(flag for batch in self.config.batches() for flag in batch.flags)
        changes = [
            f"--{name} was {theirs.get(name)!r}, now {ours.get(name)!r}"
            for name in sorted({*ours, *theirs})
            if name not in may_change and ours.get(name) != theirs.get(name)
        ]
        if values["data"] != self.data and not changes:
            changes = ["the data has other rows, or is prepared in another way"]
        if changes and not self.config.resume_anyway:
            raise UserError(
                f"{path} was made with another configuration: {'; '.join(changes)}: run the same command "
                "again, add --resume_anyway to go on with the new one, or --resume never to start anew"
            )

    def _check_batches(self, values: dict, path: Path) -> None:
        """On another number of ranks other batches per rank make the same ones over all: those must be the same."""
        made, now = values["batches"], _batches(self.config)
        if made.keys() != now.keys():
            raise UserError(f"{path} is a checkpoint of another step: name one of this step, or --resume never")
        wrong = [batch for batch in self.config.batches() if now[batch.what] != made[batch.what]]
        if wrong and not self.config.resume_anyway:
            had = " and ".join(f"{made[batch.what]} {batch.what}" for batch in wrong)
            has = " and ".join(str(now[batch.what]) for batch in wrong)
            advice = " ".join(batch.flags_for(made[batch.what], world_size()) for batch in wrong)
            raise UserError(
                f"{path} was made by {_ranks(values['world_size'])} with {had}, and this run of "
                f"{world_size()} has {has}: use {advice}, or --resume never to start anew"
            )

    def _set_aside(self, damaged: bool = False) -> None:
        """Keep the checkpoints that are there from the saves of this run, which starts anew."""
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


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Within the context what is read must be what this run remembers."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path} does not hold what this run needs ({type(error).__name__}: {reason_of(error)}): go on "
            "from another, --resume PATH, or start anew, --resume never"
        ) from error


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


def _batches(config) -> dict[str, int]:
    """What all ranks make together, by the names in `Batch`."""
    return {batch.what: batch.rows * world_size() for batch in config.batches()}


def _random_state() -> dict[str, torch.Tensor]:
    states = {RANDOM_STATE: torch.get_rng_state()}
    if on_gpu():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors[RANDOM_STATE])
    if on_gpu() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _plain(config: Config) -> dict:
    """The configuration as JSON has it, without what has no effect."""
    values = {name: getattr(config, name) for name, meta in options(type(config)).items() if not meta.ignored}
    if values["deepspeed_config"]:
        values["deepspeed_config"] = read_override(values["deepspeed_config"])
    return json.loads(json.dumps(values))
