"""Computes the reference's log-probabilities of all responses once, before training, and keeps them beside the data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from alternatives.dpo.batches import FeedbackBatch, PreferenceBatch, sequence_log_probs
from common.batching.sampler import MicroBatch, evaluation_batches
from common.models.engine import Engine
from common.runtime.distributed import device, gather_objects, global_sum, is_main, rank, world_size


@torch.no_grad()
def reference_log_probs(
    engine: Engine,
    rows: Dataset,
    rows_per_batch: int,
    collate: Callable[[Dataset, MicroBatch], PreferenceBatch | FeedbackBatch],
) -> np.ndarray:
    """(N, 2) float32: log pi_ref of the two responses of every row, in nats, in the order in which `collate` has them.
    All ranks call it, each computes a share."""
    table = torch.zeros(len(rows), 2, device=device())
    engine.eval()
    for micro_batch in evaluation_batches(rows["length"], rows_per_batch, world_size(), rank()):
        batch = collate(rows, micro_batch).to(device())
        both = sequence_log_probs(engine, batch).float().view(2, -1).T
        table[torch.tensor(micro_batch.indices, device=device())[batch.real]] = both[batch.real]
    engine.train()
    return global_sum(table).cpu().numpy()


def kept(file: Path, rows: int) -> np.ndarray | None:
    """What `keep` wrote for so many rows, the same on every rank; None if rank 0 finds no such file, or it is
    damaged."""
    found = None
    if is_main():
        try:
            found = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            found = None
        if found is not None and found.shape != (rows, 2):
            found = None
    return gather_objects(found)[0]


def keep(file: Path, table: np.ndarray) -> None:
    """Write the table, on rank 0 alone; a file is whole or does not exist."""
    if is_main():
        draft = file.with_suffix(f".{os.getpid()}.npy")
        np.save(draft, table)
        os.replace(draft, file)


def name_of(model: str | None, data: str, number_format: str) -> str:
    """The file's name: a hash of all that the numbers depend on.

    Args:
        model: the digest of the reference's files.
        data: key of the prepared data, which depends on the tokenizer, the template and the lengths.
    """
    content = "\n".join([str(model), data, number_format])
    return f"reference-{hashlib.sha256(content.encode()).hexdigest()[:16]}.npy"


def with_reference(rows: Dataset, table: np.ndarray) -> Dataset:
    """The rows with a column `reference`: the two numbers of the table."""
    return rows.add_column("reference", table.tolist())
