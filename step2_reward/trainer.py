"""Reward modelling: a pairwise loss on the scores of two answers to one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from datasets import Dataset

from common.batching.collate import PairBatch, collate_comparisons, unmasked
from common.batching.sampler import MicroBatch
from common.data.tokenization import Codec
from common.models.scalar import score_at_last_token
from common.runtime.distributed import device, global_sum
from common.training.atomic_step import AtomicStep
from common.training.engine import gradient_norm
from common.training.metrics import Sums, add_sums, means
from step2_reward.loss import bradley_terry_loss_sum, score_mean_and_std


class RewardTrainer:
    """Trains and evaluates one engine on comparisons.

    Args:
        engine: a DeepSpeed engine around a `ScalarModel`.
        train, evaluation: prepared comparisons.
        evaluation_batches: this rank's part of the evaluation.
        pad_id: fills the right of short rows.
        margin, centring: see `bradley_terry_loss_sum`.
        max_skipped_steps: so many optimizer steps skipped in a row end the run.
    """

    def __init__(
        self,
        engine,
        train: Dataset,
        evaluation: Dataset,
        evaluation_batches: Sequence[MicroBatch],
        pad_id: int,
        margin: float,
        centring: float,
        max_skipped_steps: int = 1,
    ):
        self.engine = engine
        self.step = AtomicStep({"model": engine}, max_skipped_steps)
        self.train, self.evaluation, self.evaluation_batches = train, evaluation, evaluation_batches
        self.pad_id, self.margin, self.centring = pad_id, margin, centring

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """One optimizer step, unless it is skipped; the loss is the mean over its pairs on all ranks."""
        batches = list(self._batches(self.train, micro_batches))
        pairs = global_sum(sum(batch.real.sum() for batch in batches))
        parts: list[Sums] = []

        def loss_of(batch: PairBatch) -> torch.Tensor:
            loss, sums = self._loss_sum(batch)
            parts.append(sums)
            return loss / pairs

        learning_rate = self.engine.get_lr()[0]  # after the step it is the next one's
        self.step.accumulate("model", "loss", batches, loss_of)
        if self.step.finite_on_all_ranks():
            self.engine.step()
        else:
            self.step.skip()
        sums = means(add_sums(parts, global_sum), "pairs")
        return {
            "loss": sums["loss"],
            "accuracy": sums["accuracy"],
            "margin": sums["margin"],
            "pairs": int(pairs),
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm(self.engine),
            "skipped_steps": self.step.skipped,
        }

    def probe(self, rows: int) -> None:
        """Forward and backward of a micro-batch of the longest pair, so many times; nothing is kept of it."""
        longest = int(np.argmax(self.train["length"]))
        batches = self._batches(self.train, [MicroBatch((longest,) * rows, (True,) * rows)])
        self.step.accumulate("model", "loss", batches, lambda batch: self._loss_sum(batch)[0])
        self.step.discard()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Over all held-out pairs: accuracy, mean scores, margin, and the mean and std of all scores."""
        self.engine.eval()
        parts = [self._loss_sum(batch)[1] for batch in self._batches(self.evaluation, self.evaluation_batches)]
        self.engine.train()
        sums = add_sums(parts, global_sum)
        mean, std = score_mean_and_std(sums)
        average = means(sums, "pairs")
        names = ("loss", "accuracy", "chosen_score", "rejected_score", "margin")
        return {**{name: average[name] for name in names}, "score_mean": mean, "score_std": std}

    @torch.no_grad()
    def samples(self, codec: Codec, rows: int = 8) -> list[dict]:
        """The first held-out pairs with their scores. All ranks must call it."""
        self.engine.eval()
        pairs = self.evaluation.select(range(min(rows, len(self.evaluation))))
        everything = MicroBatch(tuple(range(len(pairs))), (True,) * len(pairs))
        chosen, rejected = self._scores(collate_comparisons(pairs, everything, self.pad_id).to(device())).chunk(2)
        self.engine.train()
        return [
            {
                "prompt": codec.tokenizer.decode(pair["prompt_ids"], skip_special_tokens=True),
                "chosen": codec.decode_response(pair["chosen_ids"]),
                "chosen_score": float(chosen[row]),
                "rejected": codec.decode_response(pair["rejected_ids"]),
                "rejected_score": float(rejected[row]),
            }
            for row, pair in enumerate(pairs)
        ]

    def _batches(self, dataset: Dataset, micro_batches: Sequence[MicroBatch]) -> Iterable[PairBatch]:
        for micro_batch in micro_batches:
            yield collate_comparisons(dataset, micro_batch, self.pad_id).to(device())

    def _loss_sum(self, batch: PairBatch) -> tuple[torch.Tensor, Sums]:
        chosen, rejected = self._scores(batch).chunk(2)
        return bradley_terry_loss_sum(chosen, rejected, batch.real, margin=self.margin, centring=self.centring)

    def _scores(self, batch: PairBatch) -> torch.Tensor:
        numbers = self.engine(**unmasked(batch.input_ids))
        return score_at_last_token(numbers, batch.lengths)
