"""Runs the iterations of PPO, and the evaluations before, between and after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, count, islice

from datasets import Dataset
from tqdm import tqdm

from common.artifacts.tracking import Tracker
from common.batching.sampler import MicroBatch, StepSampler
from common.config.option import Phase
from common.runtime import heartbeat
from common.runtime.distributed import say
from common.runtime.signals import mark_training_started
from common.runtime.terminal import escape_controls
from common.training.loop import describe
from common.training.memory import named_when_out_of_memory
from common.training.metrics import Metrics
from step3_ppo.config import PPOConfig
from step3_ppo.evaluation import evaluate, sample_rows
from step3_ppo.sharing import RolloutAbandoned
from step3_ppo.trainer import PPOTrainer

SHOWN_METRICS = ("reward", "kl", "response_length", "eos_fraction")
PRINTED_RESPONSES = 3


def run_iterations(
    trainer: PPOTrainer,
    held_out: Dataset,
    sampler: StepSampler,
    iterations: int,
    tracker: Tracker,
    iterations_done: int = 0,
    on_iteration_end: Callable[[int, int], None] = lambda iterations, optimizer_steps: None,
) -> Metrics:
    """Evaluate, then run all iterations, with evaluations between them and after the last; returns its metrics.

    Args:
        held_out: prompts to evaluate on.
        sampler: one of its steps is the prompts of one iteration.
        iterations: number of iterations of the run, over as many epochs as needed.
        iterations_done: number of iterations that the interrupted run has done.
        on_iteration_end: called with the numbers of iterations and of optimizer steps done so far, but not after the
            last iteration; it saves checkpoints, and ends a run that was asked to stop. It is also called if a
            rollout was abandoned for that reason. The evaluation after an iteration follows this call, so a resumed
            run repeats it.
    """
    mark_training_started()
    prompts = chain.from_iterable(sampler.epoch(epoch) for epoch in count())
    try:
        with tracker.progress(iterations, "ppo", iterations_done) as bar:
            for micro_batches in islice(prompts, iterations_done, iterations):
                if evaluation_is_due(trainer.config, iterations_done):
                    record_evaluation(trainer, held_out, iterations_done, iterations, tracker)
                run_iteration(trainer, iterations_done, micro_batches, tracker, bar)
                iterations_done += 1
                if iterations_done < iterations:
                    on_iteration_end(iterations_done, trainer.optimizer_steps_made)
        return record_evaluation(trainer, held_out, iterations, iterations, tracker)
    except RolloutAbandoned:
        on_iteration_end(iterations_done, trainer.optimizer_steps_made)
        raise


def evaluation_is_due(config: PPOConfig, iterations_done: int) -> bool:
    """Whether to evaluate after so many iterations, besides the last."""
    return not iterations_done or (config.eval_interval > 0 and iterations_done % config.eval_interval == 0)


def run_iteration(
    trainer: PPOTrainer, index: int, micro_batches: Sequence[MicroBatch], tracker: Tracker, bar: tqdm
) -> None:
    """Run one iteration, and log and print its metrics."""
    config, step = trainer.config, index + 1
    heartbeat.set_phase("training")
    metrics = trainer.iteration(index, micro_batches)
    bar.set_postfix({name: f"{metrics[name]:.4g}" for name in SHOWN_METRICS if name in metrics}, refresh=False)
    bar.update()
    if step % config.log_interval == 0:
        tracker.log("train", step, metrics)
    if config.print_answers and step % config.print_answers_interval == 0:
        print_responses(trainer)


def record_evaluation(trainer: PPOTrainer, held_out: Dataset, step: int, iterations: int, tracker: Tracker) -> Metrics:
    """Respond to held-out prompts, if there are any; log the metrics and write the responses to samples/."""
    heartbeat.set_phase("evaluation")
    with named_when_out_of_memory(Phase.EVALUATION):
        metrics, rows = evaluate(trainer, held_out)
    if not rows:
        return {}
    tracker.log("eval", step, metrics)
    tracker.samples({0: "before", iterations: "after"}.get(step, f"iteration-{step}"), rows)
    say(f"evaluation after {step} of {iterations} iterations: " + describe(metrics))
    return metrics


def print_responses(trainer: PPOTrainer) -> None:
    """Print a few responses of the last iteration."""
    if trainer.latest is None:
        return
    for row in sample_rows(*trainer.latest, trainer.codec, trainer.prompts, PRINTED_RESPONSES):
        say("--- " + ", ".join(f"{name} {row[name]:.3f}" for name in ("reward", "kl") if name in row))
        say(escape_controls(f"{row['prompt'].strip()}\n>>> {row['response'].strip()}"))
