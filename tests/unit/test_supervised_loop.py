"""When steps 1 and 2 evaluate, and when they end."""

import json

import pytest

from common.artifacts.tracking import Tracker
from common.batching.sampler import StepSampler
from common.errors import TrainingFailure
from common.supervised.run import scheduled_steps
from common.training.loop import SupervisedLoop
from step1_sft.config import SFTConfig


def evaluated_after(directory, *, epochs=2, eval_interval=0, stop_after=0, losses=()) -> list[int]:
    """The optimizer steps after which a loop over 5 rows, 2 in a step, has evaluated: 3 steps are an epoch."""
    sampler = StepSampler([4] * 5, rows_per_micro_batch=2, micro_batches_per_step=1, world_size=1, rank=0, seed=0)
    following = iter(losses)
    tracker = Tracker(directory, tensorboard=False)
    tracker.begin()
    loop = SupervisedLoop(sampler, tracker, epochs, eval_interval, stop_after, log_interval=1, print_steps=False)
    trained, counts = [], []

    def train_step(micro_batches):
        trained.append(micro_batches)
        return {"loss": 1.0, "learning_rate": 0.1}

    def evaluate():
        counts.append(len(trained))
        return {"loss": next(following, 1.0)}

    try:
        loop.run(train_step, evaluate)
    finally:
        tracker.close()
    logged = [json.loads(line) for line in (directory / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if row["phase"] == "eval"] == counts
    assert len(trained) == loop.total_steps
    config = SFTConfig(num_train_epochs=epochs, per_device_train_batch_size=2)
    assert (
        scheduled_steps(config, rows=5) == 3 * epochs
    )  # learning rates are those of the whole run, also where it stops early
    return counts


@pytest.mark.parametrize(
    "choices, steps",
    [
        ({}, [0, 3, 6]),
        ({"epochs": 1}, [0, 3]),
        ({"eval_interval": 1}, [*range(7)]),
        ({"eval_interval": 2}, [0, 2, 3, 4, 6]),
        ({"eval_interval": 3}, [0, 3, 6]),
        ({"stop_after": 4}, [0, 3, 4]),
        ({"stop_after": 2, "eval_interval": 1}, [0, 1, 2]),
        ({"stop_after": 100}, [0, 3, 6]),
    ],
)
def test_evaluates_before_after_every_epoch_and_every_interval(tmp_path, capsys, choices, steps):
    assert evaluated_after(tmp_path, **choices) == steps


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path, capsys):
    with pytest.raises(TrainingFailure, match="the loss of the evaluation after 3 of 6 steps is nan"):
        evaluated_after(tmp_path, losses=[1.0, float("nan")])
