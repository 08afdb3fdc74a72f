"""Comparisons as tensors, with what the reference says of them, and their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from datasets import Dataset
from torch import Tensor

from common.batching.collate import PairBatch, collate_comparisons, unmasked
from common.batching.sampler import MicroBatch
from common.models.engine import Engine
from common.models.logprobs import response_log_probs


@dataclass(frozen=True)
class PreferenceBatch(PairBatch):
    """B comparisons as 2B sequences, see `PairBatch`.

    Attributes:
        reference: (2B,) log pi_ref of each response, in nats; zeros where it was not computed.
    """

    reference: Tensor

    @property
    def response_lengths(self) -> Tensor:
        """(2B,) long, tokens of each response."""
        return self.lengths - self.prompt_lengths


def collate_preferences(dataset: Dataset, micro_batch: MicroBatch, pad_id: int) -> PreferenceBatch:
    """Each row's prompt with both responses, and the column `reference` if there is one."""
    pairs = collate_comparisons(dataset, micro_batch, pad_id)
    if "reference" in dataset.column_names:
        rows = dataset[list(micro_batch.indices)]["reference"]
        reference = torch.tensor(rows, dtype=torch.float32).T.flatten()
    else:
        reference = torch.zeros(len(pairs.lengths))
    return PreferenceBatch(**{field.name: getattr(pairs, field.name) for field in fields(pairs)}, reference=reference)


def sequence_log_probs(engine: Engine, batch: PreferenceBatch) -> Tensor:
    """(2B,) log pi(y | x) of each response, its end token included, in nats.

    Chosen and rejected responses are read in one pass, and the output head at response positions only.
    """
    inputs = unmasked(batch.input_ids)
    return response_log_probs(engine, inputs, batch.prompt_lengths, batch.response_lengths).sum(1)
