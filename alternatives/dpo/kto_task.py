"""Defines Kahneman-Tversky optimisation: a loss on responses that are each marked as good or bad, without pairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from alternatives.dpo.batches import FeedbackBatch, collate_feedback, sequence_log_probs
from alternatives.dpo.config import DPOConfig
from alternatives.dpo.kto_loss import KTOOptions, kl_baseline, kto_loss_sum, kto_metrics
from alternatives.dpo.loss import Responses
from alternatives.dpo.mismatched import with_mismatched
from alternatives.dpo.reference_task import ReferenceTask
from common.artifacts.split_rule import data_request
from common.batching.sampler import MicroBatch
from common.data.prepare import PreparedData, prepare
from common.data.tokenization import Codec
from common.errors import named_by
from common.models.engine import Engine
from common.runtime.distributed import device, global_sum
from common.training.metrics import Metrics, Sums, masked_sum


class KTOTask(ReferenceTask[FeedbackBatch]):
    """Trains a language model towards the responses that are marked as good, and away from the others.

    Attributes:
        baseline: z_0 of the optimizer step or evaluation that is under way, a scalar in nats, see `kl_baseline`.
    """

    unit = "rows"

    def __init__(self, config: DPOConfig):
        super().__init__(config)
        self.baseline = torch.zeros((), dtype=torch.float64)

    def prepare(self, codec: Codec) -> PreparedData:
        """Prepare this step's part of --data_path: each row with a response to another prompt."""
        request = data_request(self.config, "feedback", self.config.max_seq_len)
        data = prepare(replace(request, pairs_per_prompt=self.config.pairs_per_prompt), codec)
        with named_by("--loss_type kto:"):
            return replace(
                data,
                train=with_mismatched(data.train, self.config.max_seq_len, "all rows to train on"),
                eval=with_mismatched(data.eval, self.config.max_seq_len, "all held-out rows, see --eval_fraction"),
            )

    def collate(self, rows: Dataset, micro_batch: MicroBatch, pad_id: int) -> FeedbackBatch:
        return collate_feedback(rows, micro_batch, pad_id)

    def count(self, batch: FeedbackBatch) -> Tensor:
        return batch.real.sum()

    def begin(self, engine: Engine, batches: Iterable[FeedbackBatch]) -> None:
        """Measure z_0 over all rows on all ranks, so that it does not depend on how these are divided."""
        sums = torch.zeros(2, dtype=torch.float64, device=device())
        for batch in batches:
            mismatched = batch.responses(mismatched=True)
            ratios = sequence_log_probs(engine, mismatched) - self.reference_log_probs(mismatched)
            sums += torch.stack([masked_sum(ratios, batch.real), batch.real.sum(dtype=torch.float64)])
        self.baseline = kl_baseline(*global_sum(sums))

    def loss_sum(self, engine: Engine, batch: FeedbackBatch) -> tuple[Tensor, Sums]:
        matched = batch.responses()
        responses = Responses(
            sequence_log_probs(engine, matched), self.reference_log_probs(matched), matched.response_lengths
        )
        config = self.config
        options = KTOOptions(config.beta, config.desirable_weight, config.undesirable_weight)
        return kto_loss_sum(responses, batch.desirable, batch.real, self.baseline.to(batch.real.device), options)

    def evaluation_metrics(self, sums: Sums) -> Metrics:
        """See `kto_metrics`."""
        return kto_metrics(sums)

    def train_metrics(self, sums: Sums) -> Metrics:
        return {**kto_metrics(sums), "rows": int(sums["rows"])}

    def shown(self, row: dict[str, Any], codec: Codec) -> dict[str, Any]:
        """A held-out row's own response and its mark."""
        return {"given": codec.decode_response(row["response_ids"]), "desirable": row["desirable"]}
