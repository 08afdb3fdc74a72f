"""Defines reward modelling: a pairwise loss on the scores of two responses to one prompt."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from common.batching.collate import PairBatch, collate_comparisons
from common.batching.sampler import MicroBatch
from common.data.prepare import PreparedData
from common.data.tokenization import Codec
from common.errors import UserError
from common.models.configuration import check_encoder_decoder, gives_scores, load_config
from common.models.engine import Engine
from common.models.loading import load_scoring_model
from common.models.scalar import ScoringModel, sequence_scores
from common.runtime.distributed import device
from common.supervised.comparisons import prepare_comparisons
from common.supervised.task import SupervisedTask
from common.training.metrics import Metrics, Sums, means
from step2_reward.config import RewardConfig
from step2_reward.loss import bradley_terry_loss_sum, score_mean_and_std


class RewardTask(SupervisedTask[RewardConfig, PairBatch]):
    """Trains a model with a score head to score the chosen response of a comparison above the rejected one."""

    config_class = RewardConfig
    step = "reward"
    unit = "pairs"
    sequences_per_row = 2  # a pair is padded to its longer response

    def check_model(self, source: str) -> None:
        """Accepts a language model, an encoder, or a reward model with one score."""
        gives_scores(source, self.config.trust_remote_code)
        check_encoder_decoder(source, load_config(source, self.config.trust_remote_code))

    def prepare(self, codec: Codec) -> PreparedData:
        """Prepare this step's part of --data_path."""
        data = prepare_comparisons(self.config, codec, self.config.margin_column)
        if not len(data.eval):
            raise UserError(
                "no pair is held out, so the scores' mean and spread cannot be measured: raise "
                "--eval_fraction or give more data"
            )
        return data

    def load_model(self, source: str, codec: Codec, **settings: Any) -> nn.Module:
        return load_scoring_model(source, codec, seed=self.config.seed, **settings)

    def adapted_part(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, ScoringModel)
        return model.classifier

    def collate(self, rows: Dataset, micro_batch: MicroBatch, pad_id: int) -> PairBatch:
        return collate_comparisons(rows, micro_batch, pad_id)

    def count(self, batch: PairBatch) -> Tensor:
        return batch.real.sum()

    def loss_sum(self, engine: Engine, batch: PairBatch) -> tuple[Tensor, Sums]:
        chosen, rejected = self._scores(engine, batch).chunk(2)
        margin = self.config.margin if self.config.margin_column is None else batch.margins
        return bradley_terry_loss_sum(chosen, rejected, batch.real, margin=margin, centring=self.config.centring_coef)

    def train_metrics(self, sums: Sums) -> Metrics:
        average = means(sums, "pairs")
        return {**{name: average[name] for name in ("loss", "accuracy", "margin")}, "pairs": int(sums["pairs"])}

    def evaluation_metrics(self, sums: Sums) -> Metrics:
        """Accuracy, mean scores, margin, and the mean and standard deviation of all scores, chosen and rejected."""
        average = means(sums, "pairs")
        mean, std = score_mean_and_std(sums)
        names = ("loss", "accuracy", "chosen_score", "rejected_score", "margin")
        return {**{name: average[name] for name in names}, "score_mean": mean, "score_std": std}

    def samples(self, engine: Engine, held_out: Dataset, codec: Codec, rows: int = 8) -> list[dict[str, Any]]:
        """The first held-out pairs with their scores."""
        pairs = held_out.select(range(min(rows, len(held_out))))
        everything = MicroBatch(tuple(range(len(pairs))), (True,) * len(pairs))
        batch = collate_comparisons(pairs, everything, codec.pad_id).to(device())
        chosen, rejected = self._scores(engine, batch).chunk(2)
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

    def provenance(self, metrics: Metrics) -> dict[str, Any]:
        """The mean and standard deviation by which step 3 normalises scores."""
        return {"score_mean": metrics["score_mean"], "score_std": metrics["score_std"]}

    def _scores(self, engine: Engine, batch: PairBatch) -> Tensor:
        """(2B,) raw scores of the sequences."""
        return sequence_scores(engine, batch.input_ids, batch.lengths)
