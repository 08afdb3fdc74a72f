"""Supervised fine-tuning: next-token loss on the response tokens, perplexity on held-out demonstrations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from datasets import Dataset

from common.batching.collate import FlatBatch, PackedBatch, TokenBatch, collate_demonstrations, collate_prompts
from common.batching.sampler import MicroBatch
from common.data.tokenization import Codec
from common.models.logprobs import next_token_loss_sum
from common.runtime.distributed import device, global_sum, world_size
from common.training.atomic_step import AtomicStep
from common.training.engine import gradient_norm
from step1_sft.packing import Packing

Batch = TokenBatch | PackedBatch | FlatBatch


class SFTTrainer:
    """Trains and evaluates one engine on demonstrations.

    Args:
        engine: a DeepSpeed engine around a causal language model.
        train, evaluation: prepared demonstrations.
        evaluation_batches: this rank's part of the evaluation.
        pad_id: fills the right of short rows.
        train_on_prompt: whether prompt tokens are targets too.
        max_skipped_steps: so many optimizer steps skipped in a row end the run.

    Attributes:
        packing: how rows that share a sequence are kept apart.
    """

    def __init__(
        self,
        engine,
        train: Dataset,
        evaluation: Dataset,
        evaluation_batches: Sequence[MicroBatch],
        pad_id: int,
        train_on_prompt: bool,
        max_skipped_steps: int = 1,
    ):
        self.engine = engine
        self.step = AtomicStep({"model": engine}, max_skipped_steps)
        self.train, self.evaluation, self.evaluation_batches = train, evaluation, evaluation_batches
        self.pad_id, self.train_on_prompt = pad_id, train_on_prompt
        self.packing: Packing | None = None

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """One optimizer step, unless it is skipped; the loss is the mean over its target tokens on all ranks."""
        batches = list(self._batches(self.train, micro_batches))
        tokens = global_sum(sum(batch.loss_mask[:, 1:].sum() for batch in batches))
        learning_rate = self.engine.get_lr()[0]  # after the step it is the next one's
        loss = self.step.accumulate("model", "loss", batches, lambda batch: self._loss_sum(batch)[0] / tokens)
        if self.step.finite_on_all_ranks():
            self.engine.step()
        else:
            self.step.skip()
        return {
            "loss": float(global_sum(loss)),
            "tokens": int(tokens),
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm(self.engine),
            "skipped_steps": self.step.skipped,
        }

    def probe(self, rows: int) -> None:
        """Forward and backward of a micro-batch of the longest row, so many times; nothing is kept of it."""
        longest = int(np.argmax(self.train["length"]))
        batches = self._batches(self.train, [MicroBatch((longest,) * rows, (True,) * rows)])
        self.step.accumulate("model", "loss", batches, lambda batch: self._loss_sum(batch)[0])
        self.step.discard()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean next-token loss over all held-out target tokens, in nats, and its exponential, the perplexity."""
        if not self.evaluation_batches:
            return {}
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=device())
        for batch in self._batches(self.evaluation, self.evaluation_batches):
            totals += torch.stack([total.double() for total in self._loss_sum(batch)])
        self.engine.train()
        loss, tokens = global_sum(totals).tolist()
        mean = loss / max(tokens, 1)
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}

    @torch.no_grad()
    def samples(self, codec: Codec, rows: int = 8, max_new_tokens: int = 64) -> list[dict[str, str]]:
        """Greedy answers to the first distinct held-out prompts beside the demonstrations. All ranks must call it."""
        chosen = self.evaluation.select(first_distinct(self.evaluation, rows))
        if not len(chosen):
            return []
        self.engine.eval()
        prompts = collate_prompts(chosen, MicroBatch(tuple(range(len(chosen))), (True,) * len(chosen)), self.pad_id)
        prompts = prompts.to(device())
        width = prompts.input_ids.shape[1]
        positions = getattr(self.engine.module.config.get_text_config(), "max_position_embeddings", None)
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - width)
        tokens = prompts.input_ids
        if room > 0:
            tokens = self.engine.module.generate(
                input_ids=tokens,
                attention_mask=prompts.attention_mask,
                max_new_tokens=room,
                do_sample=False,
                use_cache=True,
                synced_gpus=self.engine.zero_optimization_partition_weights() and world_size() > 1,
            )
        self.engine.train()
        return [
            {
                "prompt": codec.tokenizer.decode(row["prompt_ids"], skip_special_tokens=True),
                "response": codec.decode_response(answer),
                "demonstration": codec.decode_response(row["response_ids"]),
            }
            for row, answer in zip(chosen, tokens[:, width:].tolist())
        ]

    def _batches(self, dataset: Dataset, micro_batches: Sequence[MicroBatch]) -> Iterable[Batch]:
        for micro_batch in micro_batches:
            batch = collate_demonstrations(dataset, micro_batch, self.pad_id, self.train_on_prompt)
            yield (batch.flat() if micro_batch.packs and self.packing is Packing.FLAT else batch).to(device())

    def _loss_sum(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return next_token_loss_sum(self.engine, batch.inputs(self.engine.module.dtype), batch.loss_mask)


def first_distinct(demonstrations: Dataset, count: int) -> list[int]:
    """The first rows with different prompts, `count` at most: data may ask the same thing several times."""
    found: dict[tuple[int, ...], int] = {}
    for index, row in enumerate(demonstrations):
        if len(found) == count:
            break
        found.setdefault(tuple(row["prompt_ids"]), index)
    return list(found.values())
