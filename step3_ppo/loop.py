"""The iterations of a PPO run, and the evaluations before, between and after them."""
from __future__ import annotations

from collections.abc import Callable
from itertools import chain, count, islice

from common.data.sampler import StepSampler
from common.distributed import say
from common.loop import describe
from common.memory import named_when_out_of_memory
from common.tracking import Tracker
from step3_ppo.trainer import PPOTrainer

SHOWN = ("reward", "kl", "response_length", "eos_fraction")
PRINTED_ANSWERS = 3


def run_iterations(trainer: PPOTrainer, sampler: StepSampler, iterations: int, tracker: Tracker, done: int = 0,
                   after_iteration: Callable[[int, int], None] = lambda step, optimizer_steps: None) -> None:
    """Evaluate, then run all iterations, with evaluations between them. The last evaluation is the caller's.

    Args:
        sampler: one of its steps is the prompts of one iteration.
        iterations: how many, over as many epochs as that takes.
        done: iterations that an interrupted run has made already.
        after_iteration: called with the iterations and the optimizer steps made so far, but not after the last.
    """
    config = trainer.config
    if not done:
        evaluate(trainer, 0, iterations, tracker)
    prompts = chain.from_iterable(sampler.epoch(epoch) for epoch in count())
    with tracker.progress(iterations, "ppo", done) as bar:
        for index, micro_batches in enumerate(islice(prompts, done, iterations), start=done):
            step = index + 1
            training = trainer.iteration(index, micro_batches)
            bar.set_postfix({name: f"{training[name]:.4g}" for name in SHOWN}, refresh=False)
            bar.update()
            if step % config.log_interval == 0:
                tracker.log("train", step, training)
            if config.print_answers and step % config.print_answers_interval == 0:
                print_answers(trainer)
            if config.eval_interval and step % config.eval_interval == 0 and step < iterations:
                evaluate(trainer, step, iterations, tracker)
            if step < iterations:
                after_iteration(step, trainer.optimizer_steps_made)


def evaluate(trainer: PPOTrainer, step: int, iterations: int, tracker: Tracker) -> dict[str, float]:
    """Answer held-out prompts; log the metrics and write the answers to samples/. Nothing where none are held out."""
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
        say(f"{row['prompt'].strip()}\n>>> {row['response'].strip()}")
