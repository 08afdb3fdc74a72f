"""Defines supervised fine-tuning: next-token loss on response tokens, perplexity on held-out demonstrations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor, nn

from common.artifacts.split_rule import data_request
from common.batching.collate import FlatBatch, PackedBatch, TokenBatch, collate_demonstrations
from common.batching.sampler import MicroBatch
from common.data.prepare import PreparedData, prepare_many
from common.data.request import DataRequest
from common.data.streaming import RowStream
from common.data.tokenization import Codec
from common.errors import UserError
from common.models.encoder_decoder import reads_source, start_id
from common.models.engine import Engine
from common.models.loading import load_causal_lm
from common.models.logprobs import next_token_loss_sum, response_log_probs
from common.models.quantization import compute_dtype
from common.runtime.distributed import say
from common.supervised.responses import responses_to
from common.supervised.streaming import Streaming, first_rows, streamed
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

    def check_model(self, source: str) -> None:
        super().check_model(source)
        if self.config.train_on_prompt and reads_source(source, self.config.trust_remote_code):
            raise UserError(
                "--train_on_prompt: the model is an encoder-decoder, which predicts no token of a prompt: leave the "
                "option out"
            )

    def prepare(self, codec: Codec) -> PreparedData:
        """Prepare this step's part of --data_path, and all rows of --sft_only_data_path; with --stream the first of
        them."""
        requests = self.requests()
        data = prepare_many(first_rows(requests, self.config.stream_sample) if self.config.stream else requests, codec)
        if (limit := self.config.eval_max_seq_len) is None:
            return data
        fitting = np.flatnonzero(np.array(data.eval["length"]) <= limit)
        if len(fitting) < len(data.eval):
            say(f"note: {len(data.eval) - len(fitting):,} held-out rows are longer than --eval_max_seq_len {limit}")
        return replace(data, eval=data.eval.select(fitting))

    def stream(self, codec: Codec, sample: PreparedData) -> Streaming | None:
        config = self.config
        if not config.stream:
            return None
        rows = RowStream(self.requests(), codec, sample, block_rows=config.shuffle_buffer, seed=config.seed)
        return Streaming(rows, config.max_steps)

    def requests(self) -> list[DataRequest]:
        """What is read: --data_path, and --sft_only_data_path whole."""
        config = self.config
        requests = [data_request(config, "demonstration", config.max_seq_len)]
        if sources := config.unsplit_sources():
            requests.append(replace(requests[0], data_path=sources, phase=None))
        return streamed(requests) if config.stream else requests

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

        return Batching(
            self.step_sampler(rows, config, pack_to=config.max_seq_len), collate, config.eval_max_seq_len or 0
        )

    def count(self, batch: SFTBatch) -> Tensor:
        return batch.loss_mask[:, 1:].sum()

    def loss_sum(self, engine: Engine, batch: SFTBatch) -> tuple[Tensor, Sums]:
        """-log p summed over the target tokens, in nats."""
        inputs = batch.inputs(compute_dtype(engine.module))
        if isinstance(batch, TokenBatch) and start_id(engine) is not None:
            tokens = batch.loss_mask.sum()
            targets = batch.loss_mask.sum(1)  # 0 in a filler, all of which then is the source
            loss = -response_log_probs(engine, inputs, batch.lengths - targets, targets).sum()
        else:
            loss, tokens = next_token_loss_sum(engine, inputs, batch.loss_mask)
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
