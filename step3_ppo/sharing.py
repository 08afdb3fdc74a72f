"""Shares a rollout with all ranks once it is generated, and divides its forward passes between the ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.batching.sampler import evaluation_batches, token_budget_batches
from common.runtime.distributed import device, gather_objects, rank, world_size
from step3_ppo.config import PPOConfig
from step3_ppo.generation.rollout import Rollout


class RolloutAbandoned(Exception):
    """A rank was asked to stop during the rollout; raised on all ranks alike. No weight has changed."""


def share_rollout(own: Rollout | None) -> Rollout:
    """All ranks' responses on every rank, without fillers, in the order of their prompts in the data set.

    Except for `made_by`, the result does not depend on the distribution of prompts over ranks and batches.

    Raises:
        RolloutAbandoned: a rank passed None.
    """
    gathered = gather_objects(None if own is None else own.to("cpu"))
    parts = [part for part in gathered if part is not None]
    if len(parts) < len(gathered):
        raise RolloutAbandoned
    rollout = Rollout.concat(parts)
    real = rollout.real.nonzero().squeeze(1)
    return rollout.select(real[rollout.prompt_index[real].argsort(stable=True)])


def compute_on_all_ranks(
    rollout: Rollout, compute: Callable[[Rollout], dict[str, Tensor]], config: PPOConfig
) -> dict[str, Tensor]:
    """Divide a shared rollout into batches and these between ranks; return the results of all rows on every rank.

    All ranks must call it together: each computes the same number of batches.

    Args:
        rollout: B responses, the same on every rank.
        compute: from a batch on this rank's device to tensors (b,) or (b, r) by name, row by row.
        config: says how many rows or padded tokens a batch has.

    Returns:
        (B,) or (B, R) float32 tensors on the CPU; (B, R) ones are 0 after each response of a shorter batch.
    """
    lengths = rollout.lengths.tolist()
    batches = (
        token_budget_batches(lengths, config.max_tokens_per_micro_batch, world_size(), rank())
        if config.max_tokens_per_micro_batch
        else evaluation_batches(lengths, config.per_device_training_batch_size, world_size(), rank())
    )
    computed = []
    for batch in batches:
        results = compute(rollout.select(batch.indices).to(device()))
        computed.append((batch, {name: tensor.float().cpu() for name, tensor in results.items()}))
    shared: dict[str, Tensor] = {}
    for batch, results in (item for items in gather_objects(computed) for item in items):
        real = torch.tensor(batch.real)
        rows = torch.tensor(batch.indices)[real]
        for name, tensor in results.items():
            shape = rollout.response_mask.shape[: tensor.dim()]
            gathered = shared.setdefault(name, torch.zeros(shape))
            if tensor.dim() == 1:
                gathered[rows] = tensor[real]
            else:
                gathered[rows, : tensor.shape[1]] = tensor[real]
    return shared
