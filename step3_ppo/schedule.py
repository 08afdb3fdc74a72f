"""Computes how many iterations and optimizer steps a run has, and which prompts and texts they use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count
from math import ceil

from datasets import Dataset

from common.batching.collate import TokenBatch, collate_texts
from common.batching.sampler import StepSampler, steps_per_epoch
from common.data.tokenization import Codec
from common.errors import UserError
from common.runtime.distributed import rank, say, world_size
from step3_ppo.config import PPOConfig


def prompts_per_iteration(config: PPOConfig) -> int:
    """Prompts of all ranks in an iteration; the last of an epoch has what is left of them."""
    return config.per_device_generation_batch_size * config.rollout_batches_per_iteration * world_size()


def prompt_sampler(config: PPOConfig, prompts: Dataset) -> StepSampler:
    """The sampler of each iteration's prompts, which are enough for at least one full optimizer step."""
    rollout_batches = config.rollout_batches_per_iteration
    if rollout_batches > config.generation_batches:
        say(
            f"note: one optimizer step takes {config.per_device_training_batch_size} x "
            f"{config.gradient_accumulation_steps} answers per rank, so each iteration makes {rollout_batches} rollout "
            f"batches of {config.per_device_generation_batch_size}, not {config.generation_batches}"
        )
    return StepSampler(
        prompts["length"],
        rows_per_micro_batch=config.per_device_generation_batch_size,
        micro_batches_per_step=rollout_batches,
        world_size=world_size(),
        rank=rank(),
        seed=config.seed,
    )


def scheduled_iterations(config: PPOConfig, prompts: int) -> int:
    """The iterations that the learning rates are scheduled for; a test mode may stop before.

    Raises:
        UserError: the critic's warm-up leaves none of them to the actor.
    """
    in_epoch = steps_per_epoch(prompts, prompts_per_iteration(config))
    iterations = min(in_epoch * config.num_train_epochs, config.max_iterations or sys.maxsize)
    if config.critic_warmup_iterations and config.critic_warmup_iterations >= iterations:
        raise UserError(
            f"--critic_warmup_iterations {config.critic_warmup_iterations} leaves the actor none of the run's "
            f"{iterations} iterations: lower it, or raise --num_train_epochs or --max_iterations"
        )
    return iterations


def optimizer_steps(config: PPOConfig, prompts: int, iterations: int) -> int:
    """How often an engine that learns in all of them steps in so many iterations over this number of prompts.

    Fewer, where responses are left out of the updates (--drop_equal_groups, --mask_truncated_answers) or --target_kl
    cuts them short. The last iteration of every epoch has what is left of the prompts, and so perhaps fewer steps than
    the others.
    """
    rows = prompts_per_iteration(config)
    in_epoch = steps_per_epoch(prompts, rows)
    usual = optimizer_steps_per_iteration(config, rows)
    last = optimizer_steps_per_iteration(config, prompts - (in_epoch - 1) * rows)
    return iterations * usual - iterations // in_epoch * (usual - last)


def optimizer_steps_per_iteration(config: PPOConfig, prompts: int) -> int:
    """How often each engine that learns steps in a whole iteration."""
    per_step = config.per_device_training_batch_size * config.gradient_accumulation_steps * world_size()
    return config.ppo_epochs * ceil(min(prompts_per_iteration(config), prompts) * config.answers_per_prompt / per_step)


def text_batches(config: PPOConfig, texts: Dataset, codec: Codec) -> Iterator[list[TokenBatch]]:
    """Endless plain text: for every optimizer step as many rows as a full one has responses."""
    sampler = StepSampler(
        texts["length"],
        rows_per_micro_batch=config.per_device_training_batch_size,
        micro_batches_per_step=config.gradient_accumulation_steps,
        world_size=world_size(),
        rank=rank(),
        seed=config.seed,
        max_tokens=config.max_tokens_per_micro_batch,
    )
    for epoch in count():
        for micro_batches in sampler.epoch(epoch):
            yield [collate_texts(texts, micro_batch, codec.pad_id) for micro_batch in micro_batches]
