"""Defines supervised fine-tuning: next-token loss on response tokens, perplexity on held-out demonstrations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from common.artifacts.split_rule import data_request
from common.batching.collate import FlatBatch, PackedBatch, TokenBatch, collate_demonstrations
from common.batching.sampler import MicroBatch
from common.data.prepare import PreparedData, prepare_many
from common.data.tokenization import Codec
from common.models.engine import Engine
from common.models.loading import load_causal_lm
from common.models.logprobs import next_token_loss_sum
from common.runtime.distributed import say
from common.supervised.responses import responses_to
from common.supervised.task import Batching, SupervisedTask
from common.training.metrics import Metrics, Sums, means
from step1_sft.config import SFTConfig
from step1_sft.packing import Packing, packing_of

SFTBatch = TokenBatch | PackedBatch | FlatBatch


class SFTTask(SupervisedTask[SFTConfig, SFTBatch]):
    """Trains a causal language model to generate the responses of demonstrations."""

    config_class = SFTConfig
    step = "sft"
    unit = "tokens"

    def prepare(self, codec: Codec) -> PreparedData:
        """Prepare this step's part of --data_path, and all rows of --sft_only_data_path."""
        config = self.config
        requests = [data_request(config, "demonstration", config.max_seq_len)]
        if sources := config.unsplit_sources():
            requests.append(replace(requests[0], data_path=sources, phase=None))
        return prepare_many(requests, codec)

    def load_model(self, source: str, codec: Codec, **settings: Any) -> nn.Module:
        return load_causal_lm(source, codec, **settings)

    def collate(self, rows: Dataset, micro_batch: MicroBatch, pad_id: int) -> TokenBatch | PackedBatch:
        return collate_demonstrations(rows, micro_batch, pad_id, self.config.train_on_prompt)

    def batching(self, engine: Engine, rows: Dataset, config: SFTConfig, pad_id: int) -> Batching[SFTBatch]:
        """With --packing, rows share sequences. If the model cannot keep them apart, micro-batches consist of rows of
        similar length instead, with at most the same number of tokens."""
        if not config.packing:
            return super().batching(engine, rows, config, pad_id)
        packing = packing_of(engine, config.max_seq_len)
        if packing is None:
            tokens = config.max_tokens_per_micro_batch or config.per_device_train_batch_size * config.max_seq_len
            say(
                f"note: {type(engine.module).__name__} does not keep packed rows apart, so rows of like length make "
                f"micro-batches of up to {tokens} tokens instead"
            )
            return super().batching(engine, rows, replace(config, max_tokens_per_micro_batch=tokens), pad_id)
        say(f"note: rows that share a sequence are kept apart by {packing.value}")

        def collate(rows: Dataset, micro_batch: MicroBatch) -> SFTBatch:
            batch = self.collate(rows, micro_batch, pad_id)
            return batch.flat() if isinstance(batch, PackedBatch) and packing is Packing.FLAT else batch

        return Batching(self.step_sampler(rows, config, pack_to=config.max_seq_len), collate)

    def count(self, batch: SFTBatch) -> Tensor:
        return batch.loss_mask[:, 1:].sum()

    def loss_sum(self, engine: Engine, batch: SFTBatch) -> tuple[Tensor, Sums]:
        """-log p summed over the target tokens, in nats."""
        loss, tokens = next_token_loss_sum(engine, batch.inputs(engine.module.dtype), batch.loss_mask)
        return loss, {"tokens": tokens.double(), "loss": loss.detach().double()}

    def train_metrics(self, sums: Sums) -> Metrics:
        return {**means(sums, "tokens"), "tokens": int(sums["tokens"])}

    def evaluation_metrics(self, sums: Sums) -> Metrics:
        """Mean loss over all held-out target tokens, in nats, and its exponential, the perplexity."""
        loss = means(sums, "tokens")["loss"]
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def samples(self, engine: Engine, held_out: Dataset, codec: Codec) -> list[dict[str, Any]]:
        """Greedy responses to the first distinct held-out prompts, beside the demonstrations."""
        return [
            {
                "prompt": codec.tokenizer.decode(response.prompt_ids, skip_special_tokens=True),
                "response": codec.decode_response(response.ids),
                "demonstration": codec.decode_response(held_out[response.row]["response_ids"]),
            }
            for response in responses_to(engine, held_out, codec)
        ]
