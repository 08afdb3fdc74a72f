"""Makes an optimizer step of a supervised task, evaluates it, and probes the memory of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from common.batching.sampler import MicroBatch
from common.batching.streamed_steps import StreamedRows
from common.data.tokenization import Codec
from common.runtime.distributed import device, global_sum
from common.supervised.task import Batching, BatchT, ConfigT, SupervisedTask
from common.training.atomic_step import AtomicStep
from common.training.engine import TrainedEngine, gradient_norm
from common.training.memory import named_when_out_of_memory
from common.training.metrics import Metrics, StepMetrics, Sums, add_sums


class SupervisedTrainer(Generic[ConfigT, BatchT]):
    """Trains and evaluates one engine.

    Args:
        engine: a DeepSpeed engine around the model of the task.
        train, held_out: prepared rows; the former may be streamed.
        batching: how training rows become batches.
        evaluation_batches: this rank's part of the evaluation.
        max_skipped_steps: the number of consecutive skipped optimizer steps that ends the run.

    Attributes:
        step: applies or skips optimizer steps, and counts the skipped ones.
    """

    def __init__(
        self,
        task: SupervisedTask[ConfigT, BatchT],
        engine: TrainedEngine,
        train: Dataset | StreamedRows,
        held_out: Dataset,
        batching: Batching[BatchT],
        evaluation_batches: Sequence[MicroBatch],
        max_skipped_steps: int = 1,
    ):
        self.task, self.engine = task, engine
        self.train, self.held_out, self.batching = train, held_out, batching
        self.evaluation_batches = evaluation_batches
        self.step = AtomicStep({"model": engine}, max_skipped_steps)

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepMetrics:
        """Make one optimizer step, or skip it. The loss is the mean over the units of the step on all ranks."""
        batches = list(self._batches(self.train, micro_batches))
        units = global_sum(torch.stack([self.task.count(batch) for batch in batches]).sum())
        with torch.no_grad():
            self.task.begin(self.engine, batches)
        parts: list[Sums] = []

        def share_of_mean(batch: BatchT) -> Tensor:
            loss, sums = self.task.loss_sum(self.engine, batch)
            parts.append(sums)
            return loss / units

        learning_rate = self.engine.get_lr()[0]  # read before the step, which sets that of the next step
        self.step.accumulate("model", "loss", batches, share_of_mean)
        if self.step.finite_on_all_ranks():
            self.engine.step()
        else:
            self.step.skip()
        return {
            **self.task.train_metrics(add_sums(parts, global_sum)),
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm(self.engine),
            "skipped_steps": self.step.skipped,
        }

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """The metrics over the held-out rows on all ranks; an empty dict if none are held out."""
        if not self.evaluation_batches:
            return {}
        self.engine.eval()
        self.task.begin(self.engine, self._batches(self.held_out, self.evaluation_batches))
        parts = [
            self.task.loss_sum(self.engine, batch)[1] for batch in self._batches(self.held_out, self.evaluation_batches)
        ]
        self.engine.train()
        return self.task.evaluation_metrics(add_sums(parts, global_sum))

    @torch.no_grad()
    def samples(self, codec: Codec) -> Sequence[Mapping[str, Any]]:
        """What the task shows of the held-out rows. All ranks call it."""
        self.engine.eval()
        with named_when_out_of_memory("the samples"):
            rows = self.task.samples(self.engine, self.held_out, codec)
        self.engine.train()
        return rows

    def _batches(self, rows: Dataset | StreamedRows, micro_batches: Sequence[MicroBatch]) -> Iterator[BatchT]:
        for micro_batch in micro_batches:
            yield self.batching.collate(rows, micro_batch).to(device())


def probe(task: SupervisedTask[ConfigT, BatchT], engine: TrainedEngine, rows: Dataset, pad_id: int, count: int) -> None:
    """Run forward and backward on a micro-batch of `count` copies of the longest row, and discard the gradients."""
    longest = int(np.argmax(rows["length"]))
    batch = task.collate(rows, MicroBatch((longest,) * count, (True,) * count), pad_id).to(device())
    step = AtomicStep({"model": engine}, limit=1)
    step.accumulate("model", "loss", [batch], lambda batch: task.loss_sum(engine, batch)[0])
    step.discard()
