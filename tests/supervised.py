"""A trainer of a supervised task around an engine made by a test."""

from __future__ import annotations

from datasets import Dataset

from common.supervised.task import SupervisedTask
from common.supervised.trainer import SupervisedTrainer
from step1_sft.config import SFTConfig
from step1_sft.task import SFTTask
from step2_reward.config import RewardConfig
from step2_reward.task import RewardTask


def trainer_of(
    task: SupervisedTask, engine, rows: Dataset, pad_id: int, max_skipped_steps: int = 1
) -> SupervisedTrainer:
    """Trains on `rows`; nothing is held out."""
    batching = task.batching(engine, rows, task.config, pad_id)
    return SupervisedTrainer(task, engine, rows, rows, batching, [], max_skipped_steps)


def sft_trainer(engine, rows: Dataset, pad_id: int, max_skipped_steps: int = 1) -> SupervisedTrainer:
    """Of step 1."""
    return trainer_of(SFTTask(SFTConfig()), engine, rows, pad_id, max_skipped_steps)


def reward_trainer(engine, rows: Dataset, pad_id: int, max_skipped_steps: int = 1) -> SupervisedTrainer:
    """Of step 2, with a margin and centring."""
    config = RewardConfig(margin=0.5, centring_coef=0.1)
    return trainer_of(RewardTask(config), engine, rows, pad_id, max_skipped_steps)
