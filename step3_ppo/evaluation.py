"""Generates and scores responses to held-out prompts, before, between and after the iterations."""

from __future__ import annotations

from math import ceil

import torch
from datasets import Dataset

from common.batching.sampler import evaluation_batches
from common.data.tokenization import Codec
from common.runtime.distributed import rank, world_size
from step3_ppo.config import PPOConfig
from step3_ppo.generation.rollout import Rollout
from step3_ppo.metrics import CLIPPED, Metrics, rollout_metrics
from step3_ppo.responder import EVALUATION
from step3_ppo.reward import RewardInputs
from step3_ppo.scoring import ModelOutputs, observe
from step3_ppo.trainer import PPOTrainer


def evaluation_prompts(config: PPOConfig, held_out: Dataset) -> Dataset:
    """--eval_prompts of the held-out prompts, evenly spread over the data, in which sources follow one another."""
    rows = min(config.eval_prompts, len(held_out))
    return held_out.select([number * len(held_out) // rows for number in range(rows)])


@torch.no_grad()
def evaluate(trainer: PPOTrainer, prompts: Dataset) -> tuple[Metrics, list[dict]]:
    """Sample responses to held-out prompts, with the same random numbers every time.

    Returns:
        Mean metrics, and a row for every prompt: see `sample_rows`. Both are empty if there are no prompts.
    """
    if not len(prompts):
        return {}, []
    rows_per_batch = min(trainer.config.per_device_generation_batch_size, ceil(len(prompts) / world_size()))
    batches = evaluation_batches(prompts["length"][:], rows_per_batch, world_size(), rank())
    rollout = trainer.responder.roll_out(prompts, batches, EVALUATION)
    outputs = trainer.responder.score(prompts, rollout, EVALUATION)
    shaped, _ = trainer.rewards(rollout, outputs)
    metrics = rollout_metrics(rollout, shaped, outputs)
    if not observe(trainer.reward, trainer.scale, outputs):
        unknown = ("shaped_score", "score_clip_fraction")
        metrics = {name: value for name, value in metrics.items() if name not in unknown and CLIPPED not in name}
    return metrics, sample_rows(rollout, outputs, trainer.codec, prompts, len(rollout.tokens))


def sample_rows(rollout: Rollout, outputs: ModelOutputs, codec: Codec, dataset: Dataset, rows: int) -> list[dict]:
    """The first `rows` responses, each with prompt, response, reward, kl (where there is a reference), finished."""
    rows = min(rows, len(rollout.tokens))
    texts = RewardInputs(rollout, codec, dataset).select(range(rows))
    kl = outputs.response_kl()
    of_kl = [{} for _ in range(rows)] if kl is None else [{"kl": number} for number in kl.tolist()]
    columns = (texts.prompts, texts.responses, outputs.scores, of_kl, rollout.finished)
    return [
        {
            "prompt": prompt,
            "response": response,
            "reward": float(reward),
            **kl,
            "finished": bool(finished),
        }
        for prompt, response, reward, kl, finished in zip(*columns)
    ]
