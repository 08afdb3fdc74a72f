"""Defines the interface of a supervised task: its data, model, loss and metrics. Steps 1 and 2 are two such tasks.

Everything else (options, data on disk, engines, checkpoints, the loop, the result) is the same for all tasks: see
`common.supervised.run.run_supervised`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from datasets import Dataset
from torch import Tensor, nn

from common.batching.collate import Batch
from common.batching.sampler import MicroBatch, StepSampler
from common.data.prepare import PreparedData
from common.data.tokenization import Codec
from common.models.configuration import check_language_model
from common.models.engine import Engine
from common.runtime.distributed import rank, world_size
from common.supervised.config import SupervisedConfig
from common.supervised.streaming import Streaming
from common.training.metrics import Metrics, Sums

ConfigT = TypeVar("ConfigT", bound=SupervisedConfig)
BatchT = TypeVar("BatchT", bound=Batch)


@dataclass(frozen=True)
class Batching(Generic[BatchT]):
    """How rows become batches.

    Attributes:
        sampler: the rows of each optimizer step, cut into this rank's micro-batches.
        collate: turns a micro-batch of the rows into tensors on the CPU.
        evaluation_pack_to: if not 0, rows that are evaluated share sequences of so many tokens.
    """

    sampler: StepSampler
    collate: Callable[[Dataset, MicroBatch], BatchT]
    evaluation_pack_to: int = 0


class SupervisedTask(ABC, Generic[ConfigT, BatchT]):
    """A supervised task. Its methods are listed in the order in which they are called.

    Args:
        config: the options of the program.

    Attributes:
        config_class: the class of its options.
        step: name of the task in provenance.json, such as "sft".
        unit: the elements over which the loss is a mean, such as "tokens" or "pairs"; also the name of their number
            in `Sums`.
        sequences_per_row: sequences that the model reads for one row.
    """

    config_class: type[ConfigT]
    step: ClassVar[str]
    unit: ClassVar[str]
    sequences_per_row: ClassVar[int] = 1

    def __init__(self, config: ConfigT):
        self.config = config

    def check_model(self, source: str) -> None:
        """Raise ModelError if the task cannot start from this model. Loads no weights."""
        check_language_model(source, self.config.trust_remote_code)

    @abstractmethod
    def prepare(self, codec: Codec) -> PreparedData:
        """The rows to train on and those that are held out, see `common.data.prepare.prepare`.

        It is called before the ranks are connected, so no timeout limits its duration.
        """

    def stream(self, codec: Codec, sample: PreparedData) -> Streaming | None:
        """The rows to train on where they are streamed; None: they are those that were prepared.

        Args:
            sample: what `prepare` gave, whose held-out rows are evaluated in any case.
        """
        return None

    @abstractmethod
    def load_model(self, source: str, codec: Codec, **settings: Any) -> nn.Module:
        """The model to train. `settings` are those of `common.models.loading.load_causal_lm`."""

    def adapted_part(self, model: nn.Module) -> nn.Module:
        """The transformers model inside what `load_model` returned, which gets the adapters with LoRA."""
        return model

    def annotated(
        self, engine: Engine, source: str, data: PreparedData, pad_id: int, frozen_copy: Callable[[], Engine]
    ) -> PreparedData:
        """The rows with further columns that the model gives as it is before training. All ranks call it.

        It is called in every run, before a checkpoint is loaded.

        Args:
            source: directory or hub name of the model.
            frozen_copy: loads the model a second time, in an engine that does not train it.
        """
        return data

    @abstractmethod
    def collate(self, rows: Dataset, micro_batch: MicroBatch, pad_id: int) -> BatchT:
        """The rows of a micro-batch as tensors on the CPU."""

    def batching(self, engine: Engine, rows: Dataset, config: ConfigT, pad_id: int) -> Batching[BatchT]:
        """How `rows` are trained on. All ranks call it.

        Args:
            engine: the model in its engine, for tasks whose batches depend on what the model can do.
            config: the options, with the micro-batch size that fits into memory.
        """
        return Batching(self.step_sampler(rows, config), lambda rows, batch: self.collate(rows, batch, pad_id))

    @abstractmethod
    def count(self, batch: BatchT) -> Tensor:
        """The number of units (tokens, pairs) in the loss of this batch: a scalar."""

    def begin(self, engine: Engine, batches: Iterable[BatchT]) -> None:
        """Called with all batches of an optimizer step on this rank, or of an evaluation, before the first
        `loss_sum`: for what the loss needs of all of them. All ranks call it, without gradients; they have equally
        many batches."""

    @abstractmethod
    def loss_sum(self, engine: Engine, batch: BatchT) -> tuple[Tensor, Sums]:
        """The loss of a batch as a sum over its units, a scalar with a gradient, and statistics as sums.

        Filler rows add nothing. The caller divides the sum by the number of units in the whole optimizer step on all
        ranks, so the weight of a unit does not depend on the micro-batches. The statistics hold `unit`, "loss" and what
        `train_metrics` and `evaluation_metrics` need.
        """

    def train_metrics(self, sums: Sums) -> Metrics:
        """The metrics to log for an optimizer step, from the sums over the whole step."""
        return self.evaluation_metrics(sums)

    @abstractmethod
    def evaluation_metrics(self, sums: Sums) -> Metrics:
        """The metrics to log for an evaluation, from the sums over all held-out rows."""

    def samples(self, engine: Engine, held_out: Dataset, codec: Codec) -> Sequence[dict[str, Any]]:
        """Rows for samples/after.jsonl, to be read by people. All ranks call it, without gradients, the model in
        evaluation mode."""
        return []

    def provenance(self, metrics: Metrics) -> dict[str, Any]:
        """Further fields of `common.artifacts.provenance.Provenance`, from the last evaluation."""
        return {}

    def step_sampler(self, rows: Dataset, config: ConfigT, pack_to: int = 0) -> StepSampler:
        """The sampler of optimizer steps over prepared rows; for `pack_to` see `StepSampler`."""
        return StepSampler(
            [self.sequences_per_row * length for length in rows["length"]],
            rows_per_micro_batch=config.per_device_train_batch_size,
            micro_batches_per_step=config.gradient_accumulation_steps,
            world_size=world_size(),
            rank=rank(),
            seed=config.seed,
            max_tokens=config.max_tokens_per_micro_batch,
            pack_to=pack_to,
            group_by_length=config.group_by_length,
        )
