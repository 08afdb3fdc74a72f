"""An epoch of optimizer steps as every rank sees it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from common.batching.sampler import MicroBatch, StepSampler


def ranks(
    lengths: Sequence[int],
    rows: int,
    micro_batches: int,
    world_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    **options: Any,
) -> list[list[list[MicroBatch]]]:
    """[rank][step][micro-batch].

    Args:
        rows, micro_batches: of one rank, rows in a micro-batch and micro-batches in a step.
        options: further arguments of `StepSampler`.
    """
    samplers = [
        StepSampler(
            lengths,
            rows_per_micro_batch=rows,
            micro_batches_per_step=micro_batches,
            world_size=world_size,
            rank=rank,
            seed=seed,
            **options,
        )
        for rank in range(world_size)
    ]
    return [sampler.epoch(epoch) for sampler in samplers]


def real_rows(batches: Iterable[MicroBatch]) -> list[int]:
    """The rows of micro-batches without fillers."""
    return [row for batch in batches for row, real in zip(batch.indices, batch.real) if real]
