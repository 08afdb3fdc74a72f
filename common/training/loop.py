"""Runs the loop of supervised training: epochs of optimizer steps, and evaluations before, between and after them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from common.batching.sampler import MicroBatch
from common.config.groups import OneModelConfig
from common.config.option import Phase
from common.errors import DIVERGED, Diverged
from common.runtime import heartbeat
from common.runtime.distributed import say
from common.runtime.signals import mark_training_started
from common.training.memory import named_when_out_of_memory
from common.training.metrics import Metrics, Recorder, StepMetrics

TrainStep = Callable[[Sequence[MicroBatch]], StepMetrics]
Evaluate = Callable[[], Metrics]


class Steps(Protocol):
    """The optimizer steps of a run, as one rank sees them: `StepSampler` or `StreamedSteps`."""

    @property
    def steps_per_epoch(self) -> int: ...

    def steps(self, epochs: int, done: int = 0) -> Iterator[list[MicroBatch]]: ...


@dataclass
class SupervisedLoop:
    """Trains for a number of epochs over a data set.

    Attributes:
        sampler: gives every epoch's optimizer steps.
        epochs: passes over the data.
        eval_interval: optimizer steps between evaluations besides those before and after each epoch; 0 for none.
        stop_after: optimizer steps after which to stop early; 0 for never.
        log_interval: optimizer steps between lines in the metrics file.
        print_steps: print every logged step, besides the progress bar.
    """

    sampler: Steps
    tracker: Recorder
    epochs: int
    eval_interval: int
    stop_after: int
    log_interval: int
    print_steps: bool

    @classmethod
    def from_config(cls, config: OneModelConfig, sampler: Steps, tracker: Recorder) -> SupervisedLoop:
        """The loop of step 1 and step 2."""
        return cls(
            sampler,
            tracker,
            config.num_train_epochs,
            config.eval_interval,
            config.stop_after,
            config.log_interval,
            config.print_loss,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of this run."""
        steps = self.epochs * self.sampler.steps_per_epoch
        return min(steps, self.stop_after) if self.stop_after else steps

    def run(
        self,
        train_step: TrainStep,
        evaluate: Evaluate,
        done: int = 0,
        on_step_end: Callable[[int], None] = lambda step: None,
    ) -> Metrics:
        """Train to the end.

        Args:
            train_step: takes this rank's micro-batches of one optimizer step; returns what to log of it.
            evaluate: returns metrics over the held-out data; an empty dict if nothing is held out.
            done: optimizer steps that the resumed run has made already; they are not repeated.
            on_step_end: called after each step but the last, with the number of steps made; it saves a checkpoint, or
                ends a run that was asked to stop. An evaluation due after that step comes later, so that a resumed run
                makes it again.

        Returns:
            The metrics of the last evaluation.
        """
        mark_training_started()
        steps = self.sampler.steps(self.epochs, done)
        with self.tracker.progress(self.total_steps, "training", done) as bar:
            for steps_done, micro_batches in enumerate(islice(steps, self.total_steps - done), start=done):
                if self._evaluation_is_due(steps_done):
                    self._evaluate(evaluate, steps_done)
                self._train(train_step, micro_batches, steps_done + 1, bar)
                if steps_done + 1 < self.total_steps:
                    on_step_end(steps_done + 1)
        return self._evaluate(evaluate, self.total_steps)

    def _evaluation_is_due(self, step: int) -> bool:
        return step % self.sampler.steps_per_epoch == 0 or (self.eval_interval > 0 and step % self.eval_interval == 0)

    def _train(self, train_step: TrainStep, micro_batches: Sequence[MicroBatch], step: int, bar: Any) -> None:
        heartbeat.set_phase("training")
        start = time.perf_counter()
        with named_when_out_of_memory(Phase.TRAINING_STEP):
            metrics = train_step(micro_batches)
        metrics["step_seconds"] = time.perf_counter() - start
        bar.set_postfix({name: f"{metrics[name]:.4g}" for name in ("loss", "learning_rate")}, refresh=False)
        bar.update()
        if step % self.log_interval == 0:
            self.tracker.log("train", step, metrics)
            if self.print_steps:
                say(f"step {step}: " + describe(metrics))

    def _evaluate(self, evaluate: Evaluate, step: int) -> Metrics:
        heartbeat.set_phase("evaluation")
        with named_when_out_of_memory(Phase.EVALUATION):
            metrics = evaluate()
        if not metrics:
            return {}
        self.tracker.log("eval", step, metrics)
        when = f"evaluation after {step} of {self.total_steps} steps"
        for name, value in metrics.items():
            check_finite(value, name.replace("_", " "), f"the {when}")
        say(f"{when}: " + describe(metrics))
        return metrics


def check_finite(value: float, name: str, when: str) -> None:
    """Raise Diverged if a value is not finite. The value must be the same on all ranks, so that all of them end."""
    if not math.isfinite(value):
        raise Diverged(f"the {name} of {when} is {value}: {DIVERGED}")


def describe(metrics: Mapping[str, float | None]) -> str:
    """Metrics as one line for people."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items() if value is not None)
