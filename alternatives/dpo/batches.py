"""Comparisons and feedback as tensors, with what the reference says of them, and their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from datasets import Dataset
from torch import Tensor

from common.batching.collate import Batch, PairBatch, collate_comparisons, collate_responses, unmasked
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


@dataclass(frozen=True)
class FeedbackBatch(Batch):
    """B rows of feedback as 2B sequences, padded on the right: rows 0..B-1 end in the response that the row is about,
    the rest in its mismatched response, in the same order; see `alternatives.dpo.mismatched`.

    Attributes:
        input_ids: (2B, L) long.
        lengths: (2B,) long, tokens of prompt and response.
        prompt_lengths: (2B,) long, those of the prompt alone.
        reference: (2B,) log pi_ref of each response, in nats; zeros where it was not computed.
        real: (B,) bool, False for a filler.
        desirable: (B,) bool, whether the response is a good one.
    """

    input_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    reference: Tensor
    real: Tensor
    desirable: Tensor

    @property
    def response_lengths(self) -> Tensor:
        """Long, tokens of each response."""
        return self.lengths - self.prompt_lengths

    def responses(self, mismatched: bool = False) -> FeedbackBatch:
        """The same rows as B sequences, with one of their two responses, padded to the longest of these."""
        kept = slice(len(self.real), None) if mismatched else slice(len(self.real))
        lengths = self.lengths[kept]
        return FeedbackBatch(
            self.input_ids[kept, : int(lengths.max())],
            lengths,
            self.prompt_lengths[kept],
            self.reference[kept],
            self.real,
            self.desirable,
        )


def collate_preferences(dataset: Dataset, micro_batch: MicroBatch, pad_id: int) -> PreferenceBatch:
    """Each row's prompt with both responses, and the column `reference` if there is one."""
    pairs = collate_comparisons(dataset, micro_batch, pad_id)
    reference = _reference(dataset, micro_batch)
    return PreferenceBatch(**{field.name: getattr(pairs, field.name) for field in fields(pairs)}, reference=reference)


def collate_feedback(dataset: Dataset, micro_batch: MicroBatch, pad_id: int) -> FeedbackBatch:
    """Each row's prompt with its response and with its mismatched one, and the column `reference` if there is one.

    Args:
        dataset: rows of feedback as `alternatives.dpo.mismatched.with_mismatched` gives them.
    """
    rows = dataset[list(micro_batch.indices)]
    foreign = dataset[rows["mismatched"]]["response_ids"]
    mismatched = [
        response[: length - len(prompt)]
        for response, prompt, length in zip(foreign, rows["prompt_ids"], rows["length"])
    ]
    sequences = collate_responses([*rows["prompt_ids"]] * 2, [*rows["response_ids"], *mismatched], pad_id)
    reference = _reference(dataset, micro_batch)
    return FeedbackBatch(*sequences, reference, torch.tensor(micro_batch.real), torch.tensor(rows["desirable"]))


def _reference(dataset: Dataset, micro_batch: MicroBatch) -> Tensor:
    """(2B,) the column `reference`, first number by first number; zeros without it."""
    if "reference" not in dataset.column_names:
        return torch.zeros(2 * len(micro_batch.indices))
    rows = dataset[list(micro_batch.indices)]["reference"]
    return torch.tensor(rows, dtype=torch.float32).T.flatten()


def sequence_log_probs(engine: Engine, batch: PreferenceBatch | FeedbackBatch) -> Tensor:
    """(N,) log pi(y | x) of each response, its end token included, in nats.

    All sequences are read in one pass, and the output head at response positions only.
    """
    inputs = unmasked(batch.input_ids)
    return response_log_probs(engine, inputs, batch.prompt_lengths, batch.response_lengths).sum(1)
