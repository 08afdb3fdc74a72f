"""Finds the largest micro-batches that fit into memory, for --auto_micro_batch."""

from __future__ import annotations

from dataclasses import replace

from common.training.memory import fit_micro_batches
from common.training.timing import PhaseClock
from step3_ppo.config import PPOConfig
from step3_ppo.learner import Learner
from step3_ppo.models import PPOModels


def fitted_config(
    config: PPOConfig, models: PPOModels, longest_prompt: int, pad_id: int, saved_max_tokens: int | None
) -> PPOConfig:
    """The config with the --max_tokens_per_micro_batch that --auto_micro_batch measures; unchanged without that option.

    All ranks must call it.

    Args:
        longest_prompt: tokens of the longest prompt.
        saved_max_tokens: the value that the interrupted run measured; None: measure it.
    """
    if not config.auto_micro_batch:
        return config
    fitted = fit_micro_batches(
        config,
        saved_max_tokens,
        list(models.trained().values()),
        lambda rows: Learner(models, config, PhaseClock()).probe(rows, longest_prompt, pad_id),
        longest_prompt + config.max_answer_seq_len,
        config.per_device_training_batch_size * config.gradient_accumulation_steps,
    )
    # The measurement did not include the cache of keys and values.
    return replace(fitted, release_inference_cache=True)
