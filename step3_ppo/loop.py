"""The iterations of a PPO run, and the evaluations before, between and after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, count, islice

from common.artifacts.tracking import Tracker
from common.batching.sampler import MicroBatch, StepSampler
from common.runtime import heartbeat
from common.runtime.distributed import say
from common.runtime.signals import mark_training_started
from common.runtime.terminal import escape_controls
from common.training.loop import describe
from common.training.memory import named_when_out_of_memory
from step3_ppo.config import PPOConfig
from step3_ppo.scoring import RolloutAbandoned
from step3_ppo.trainer import PPOTrainer

SHOWN = ("reward", "kl", "response_length", "eos_fraction")
PRINTED_ANSWERS = 3


def run_iterations(
    trainer: PPOTrainer,
    sampler: StepSampler,
    iterations: int,
    tracker: Tracker,
    done: int = 0,
    after_iteration: Callable[[int, int], None] = lambda step, optimizer_steps: None,
) -> dict[str, float]:
    """Evaluate, then run all iterations, with evaluations between them and after the last; returns its metrics.

    Args:
        sampler: one of its steps is the prompts of one iteration.
        iterations: how many, over as many epochs as that takes.
        done: iterations that an interrupted run has made already.
        after_iteration: called with the iterations and the optimizer steps made so far, but not after the last; to
            save, or to end a run that was told to stop. Called also where a rollout was abandoned for that. The
            evaluation after that iteration comes later, and so again where a run is resumed.
    """
    mark_training_started()
    prompts = chain.from_iterable(sampler.epoch(epoch) for epoch in count())
    made = done
    try:
        with tracker.progress(iterations, "ppo", done) as bar:
            for micro_batches in islice(prompts, done, iterations):
                if evaluation_is_due(trainer.config, made):
                    evaluate(trainer, made, iterations, tracker)
                train(trainer, made, micro_batches, tracker, bar)
                made += 1
                if made < iterations:
                    after_iteration(made, trainer.optimizer_steps_made)
        return evaluate(trainer, iterations, iterations, tracker)
    except RolloutAbandoned:
        after_iteration(made, trainer.optimizer_steps_made)
        raise


def evaluation_is_due(config: PPOConfig, made: int) -> bool:
    """Whether to evaluate after so many iterations, besides the last."""
    return not made or (config.eval_interval > 0 and made % config.eval_interval == 0)


def train(trainer: PPOTrainer, index: int, micro_batches: Sequence[MicroBatch], tracker: Tracker, bar) -> None:
    """One iteration, checked and shown."""
    config, step = trainer.config, index + 1
    heartbeat.set_phase("training")
    training = trainer.iteration(index, micro_batches)
    bar.set_postfix({name: f"{training[name]:.4g}" for name in SHOWN}, refresh=False)
    bar.update()
    if step % config.log_interval == 0:
        tracker.log("train", step, training)
    if config.print_answers and step % config.print_answers_interval == 0:
        print_answers(trainer)


def evaluate(trainer: PPOTrainer, step: int, iterations: int, tracker: Tracker) -> dict[str, float]:
    """Answer held-out prompts; log the metrics and write the answers to samples/. Nothing where none are held out."""
    heartbeat.set_phase("evaluation")
    with named_when_out_of_memory("the evaluation"):
        metrics, rows = trainer.evaluate()
    if not rows:
        return {}
    tracker.log("eval", step, metrics)
    tracker.samples({0: "before", iterations: "after"}.get(step, f"iteration-{step}"), rows)
    say(f"evaluation after {step} of {iterations} iterations: " + describe(metrics))
    return metrics


def print_answers(trainer: PPOTrainer) -> None:
    """Show a few of the answers of the iteration just made."""
    for row in trainer.latest_samples(PRINTED_ANSWERS):
        say(f"--- reward {row['reward']:.3f}, kl {row['kl']:.3f}")
        say(escape_controls(f"{row['prompt'].strip()}\n>>> {row['response'].strip()}"))
