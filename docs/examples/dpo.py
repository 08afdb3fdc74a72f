"""Direct preference optimisation (arXiv:2305.18290) as a task of one's own, with all that the programs have.

    deepspeed --num_gpus 2 docs/examples/dpo.py --model_name_or_path output/sft --data_path YOUR_COMPARISONS

A model of the quickstart needs its data and split: --model_name_or_path output/quickstart/sft --data_path
builtin:courtesy --data_split 3,5,2.

The reference is the model with its adapters off, so that a single model is in memory.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository, where it is not installed

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from common.artifacts.split_rule import data_request
from common.batching.collate import PairBatch, collate_comparisons, unmasked
from common.batching.sampler import MicroBatch
from common.config.option import PathName, option
from common.config.parser import parse
from common.config.shared import same_option
from common.data.prepare import PreparedData, prepare
from common.data.tokenization import Codec
from common.models.engine import Engine
from common.models.loading import load_causal_lm
from common.models.logprobs import response_log_probs
from common.models.lora import adapters_disabled
from common.runtime.program import launch
from common.supervised.config import SupervisedConfig
from common.supervised.run import run_supervised
from common.supervised.task import SupervisedTask
from common.training.metrics import Metrics, Sums, masked_sum, means


@dataclass(frozen=True, kw_only=True)
class DPOConfig(SupervisedConfig):
    """DPO"""

    phase: ClassVar[int] = 1  # the second part of --data_split

    output_dir: PathName = same_option(SupervisedConfig, "output_dir", default="output/dpo")
    learning_rate: float = same_option(SupervisedConfig, "learning_rate", default=5e-6)
    lora_dim: int = same_option(SupervisedConfig, "lora_dim", default=8, low=1)  # without adapters it is the reference
    beta: float = option(0.1, "weight of the KL to the reference", above=0)


class DPOTask(SupervisedTask[DPOConfig, PairBatch]):
    """The actor learns to prefer the chosen response of a comparison, as far from the reference as beta allows."""

    config_class, step, unit, sequences_per_row = DPOConfig, "dpo", "pairs", 2

    def prepare(self, codec: Codec) -> PreparedData:
        return prepare(data_request(self.config, "comparison", self.config.max_seq_len), codec)

    def load_model(self, source: str, codec: Codec, **settings: Any) -> nn.Module:
        return load_causal_lm(source, codec, **settings)

    def collate(self, rows: Dataset, micro_batch: MicroBatch, pad_id: int) -> PairBatch:
        return collate_comparisons(rows, micro_batch, pad_id)

    def count(self, batch: PairBatch) -> Tensor:
        return batch.real.sum()

    def loss_sum(self, engine: Engine, batch: PairBatch) -> tuple[Tensor, Sums]:
        """-log sigmoid(beta (d_chosen - d_rejected)), d = log pi(response) - log pi_ref(response). (eq. 7)"""
        with torch.no_grad(), adapters_disabled(engine.module):
            reference = self.log_probs(engine, batch)
        chosen, rejected = (self.config.beta * (self.log_probs(engine, batch) - reference)).chunk(2)
        margin = (chosen - rejected).masked_fill(~batch.real, 0)
        loss = -F.logsigmoid(margin).masked_fill(~batch.real, 0).sum()
        sums = {"accuracy": masked_sum(margin > 0, batch.real), "margin": masked_sum(margin, batch.real)}
        return loss, {"pairs": batch.real.sum(dtype=torch.float64), "loss": loss.detach().double(), **sums}

    def log_probs(self, engine: Engine, batch: PairBatch) -> Tensor:
        """(2B,) log-probability of each whole response, in nats."""
        inputs, lengths = unmasked(batch.input_ids), batch.lengths - batch.prompt_lengths
        return response_log_probs(engine, inputs, batch.prompt_lengths, lengths).sum(1)

    def evaluation_metrics(self, sums: Sums) -> Metrics:
        return means(sums, "pairs")


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(DPOConfig, argv)
    run_supervised(DPOTask(config), config)


if __name__ == "__main__":
    launch(main)
