"""Defines direct preference optimisation: a loss on the log-probabilities of two responses to one prompt."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import Tensor

from alternatives.dpo.batches import PreferenceBatch, collate_preferences, sequence_log_probs
from alternatives.dpo.loss import Responses, preference_loss_sum
from alternatives.dpo.reference_task import ReferenceTask
from common.batching.sampler import MicroBatch
from common.data.prepare import PreparedData
from common.data.tokenization import Codec
from common.models.engine import Engine
from common.supervised.comparisons import prepare_comparisons
from common.training.metrics import Metrics, Sums, means


class DPOTask(ReferenceTask[PreferenceBatch]):
    """Trains a language model to prefer the chosen response of a comparison, with no reward model and no sampling."""

    unit = "pairs"
    sequences_per_row = 2  # a pair is padded to its longer response

    def prepare(self, codec: Codec) -> PreparedData:
        """Prepare this step's part of --data_path."""
        return prepare_comparisons(self.config, codec)

    def collate(self, rows: Dataset, micro_batch: MicroBatch, pad_id: int) -> PreferenceBatch:
        return collate_preferences(rows, micro_batch, pad_id)

    def count(self, batch: PreferenceBatch) -> Tensor:
        return batch.real.sum()

    def loss_sum(self, engine: Engine, batch: PreferenceBatch) -> tuple[Tensor, Sums]:
        log_probs = sequence_log_probs(engine, batch)
        reference = self.reference_log_probs(batch)
        chosen, rejected = (
            Responses(*of_both)
            for of_both in zip(log_probs.chunk(2), reference.chunk(2), batch.response_lengths.chunk(2))
        )
        return preference_loss_sum(self.config.loss, chosen, rejected, batch.real, self.config.loss_options())

    def evaluation_metrics(self, sums: Sums) -> Metrics:
        """Means over pairs: see `preference_loss_sum`."""
        return means(sums, "pairs")

    def train_metrics(self, sums: Sums) -> Metrics:
        return {**means(sums, "pairs"), "pairs": int(sums["pairs"])}

    def shown(self, row: dict[str, Any], codec: Codec) -> dict[str, Any]:
        """The pair."""
        return {
            "chosen": codec.decode_response(row["chosen_ids"]),
            "rejected": codec.decode_response(row["rejected_ids"]),
        }
