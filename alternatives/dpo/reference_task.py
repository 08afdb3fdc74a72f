"""Defines what DPO, its family and KTO share: a loss that compares a model with what it was before training."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor, nn

from alternatives.dpo.batches import FeedbackBatch, PreferenceBatch, collate_preferences, sequence_log_probs
from alternatives.dpo.config import DPOConfig
from alternatives.dpo.reference import keep, kept, name_of, reference_log_probs, with_reference
from common.batching.sampler import MicroBatch
from common.checkpoints.completed import model_digest
from common.data.prepare import PreparedData
from common.data.tokenization import Codec
from common.models.engine import Engine
from common.models.loading import load_causal_lm
from common.models.lora import adapters_disabled
from common.runtime.distributed import device, say
from common.supervised.responses import Response, responses_to
from common.supervised.task import SupervisedTask
from common.training.engine import resolve_dtype

ReferredT = TypeVar("ReferredT", PreferenceBatch, FeedbackBatch)


class ReferenceTask(SupervisedTask[DPOConfig, ReferredT]):
    """A supervised task with a reference, the model as it is before training.

    Attributes:
        reference: the frozen reference, or the model itself with LoRA, where --keep_reference keeps it.
    """

    config_class = DPOConfig
    step = "dpo"

    def __init__(self, config: DPOConfig):
        super().__init__(config)
        self.reference: Engine | None = None

    def load_model(self, source: str, codec: Codec, **settings: Any) -> nn.Module:
        return load_causal_lm(source, codec, **settings)

    def annotated(
        self, engine: Engine, source: str, data: PreparedData, pad_id: int, frozen_copy: Callable[[], Engine]
    ) -> PreparedData:
        """The rows with the reference's log-probabilities, unless the loss needs none or the reference is kept."""
        if not self.config.needs_reference:
            return data
        if self.config.keep_reference:
            self.reference = engine if self.config.lora_dim else frozen_copy()
            return data
        # Adapters begin as nothing: before training the model is the reference, with LoRA too.
        number_format = str(resolve_dtype(self.config.dtype))
        parts = {}
        for part, rows in (("train", data.train), ("eval", data.eval)):
            file = Path(self.config.data_output_path) / name_of(
                model_digest(source), f"{data.key} {part}", number_format
            )
            table = kept(file, len(rows))
            if table is None:
                what = f"{len(rows)} {self.unit} ({part})"
                say(f"the reference's log-probs of {what} are computed once, and kept in {file}")
                table = reference_log_probs(
                    engine,
                    rows,
                    self.config.per_device_eval_batch_size,
                    lambda rows, micro_batch: self.collate(rows, micro_batch, pad_id),
                )
                keep(file, table)
            parts[part] = with_reference(rows, table)
        return replace(data, **parts)

    @abstractmethod
    def shown(self, row: dict[str, Any], codec: Codec) -> dict[str, Any]:
        """What the samples show of a held-out row beside the model's own response to its prompt."""

    def samples(self, engine: Engine, held_out: Dataset, codec: Codec) -> list[dict[str, Any]]:
        """Sampled responses to the first distinct held-out prompts beside the data; with --keep_reference their KL."""
        responses = responses_to(engine, held_out, codec, seed=self.config.seed)
        rows: list[dict[str, Any]] = [
            {
                "prompt": codec.tokenizer.decode(response.prompt_ids, skip_special_tokens=True),
                "response": codec.decode_response(response.ids),
                **self.shown(held_out[response.row], codec),
            }
            for response in responses
        ]
        if self.reference is not None and rows:
            of_responses = self._kl(engine, self.reference, responses, codec.pad_id)
            for row, kl in zip(rows, of_responses):
                row["kl"] = kl
            say(f"KL to the reference: {mean(of_responses):.3g} nats per answer, over {len(rows)} sampled answers")
        return rows

    def _kl(self, engine: Engine, reference: Engine, responses: list[Response], pad_id: int) -> list[float]:
        """log pi(y) - log pi_ref(y) of each response y that was sampled from the model: an estimate of the KL whose
        mean is right."""
        pairs = Dataset.from_list(
            [
                {"prompt_ids": one.prompt_ids, "chosen_ids": one.ids, "rejected_ids": one.ids, "length": 0}
                for one in responses
            ]
        )
        everything = MicroBatch(tuple(range(len(pairs))), (True,) * len(pairs))
        batch = collate_preferences(pairs, everything, pad_id).to(device())
        gap = sequence_log_probs(engine, batch) - self._read(reference, batch)
        return gap.chunk(2)[0].tolist()

    def reference_log_probs(self, batch: PreferenceBatch | FeedbackBatch) -> Tensor:
        """(N,) log pi_ref of each response: of the rows, or from the reference that is kept."""
        return batch.reference if self.reference is None else self._read(self.reference, batch)

    @torch.no_grad()
    def _read(self, reference: Engine, batch: PreferenceBatch | FeedbackBatch) -> Tensor:
        with self._as_reference(reference):
            return sequence_log_probs(reference, batch)

    @contextlib.contextmanager
    def _as_reference(self, engine: Engine) -> Iterator[None]:
        if not self.config.lora_dim:
            yield
            return
        with adapters_disabled(engine.module):
            yield
