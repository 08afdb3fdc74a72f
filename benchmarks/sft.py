"""Step 1: the product's batching against rows padded to --max_seq_len. --help says all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import require_environment

    require_environment()

import torch

from benchmarks.inputs import BenchmarkOptions, random_model, with_data
from benchmarks.plain import padded_to
from benchmarks.supervised import compare_training
from common.artifacts.compatibility import open_codec
from common.artifacts.tracking import quiet_libraries
from common.batching.collate import TokenBatch
from common.batching.sampler import MicroBatch
from common.config.parser import PathName, option, parse
from common.runtime.distributed import device, global_sum, seed_rank
from common.runtime.program import run_program, start
from common.supervised.run import Inputs, build_engine
from common.supervised.trainer import SupervisedTrainer
from common.training.engine import accumulate, gradient_norm
from common.training.metrics import StepMetrics
from step1_sft.config import SFTConfig
from step1_sft.task import SFTBatch, SFTTask


@dataclass(frozen=True, kw_only=True)
class SFTBenchmark(BenchmarkOptions, SFTConfig):
    """Step 1, by its own options"""

    model_name_or_path: PathName = option("random:opt-4x256", "the model to train")
    max_seq_len: int = option(256, "longest row; the plain way pads to it", unit="tokens", low=2)
    steps: int = option(8, "optimizer steps in a run", low=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, prepare, build, compare."""
    config = with_data(parse(SFTBenchmark, argv))
    config = replace(config, learning_rate=0.0, lora_learning_rate=0.0, dropout=0.0)
    source = random_model(config.model_name_or_path, "--model_name_or_path", config)
    codec = open_codec(config, source)
    task = SFTTask(config)
    inputs = Inputs(source, codec, task.prepare(codec))
    data = inputs.data.train
    quiet_libraries(config.output_dir)
    start(config.timeout, config.seed)
    engine = build_engine(task, config, inputs, total_steps=config.steps)
    seed_rank(config.seed)
    trainer = SupervisedTrainer(task, engine, data, data, task.batching(engine, data, config, codec.pad_id), [])
    plain_step = partial(plain_train_step, trainer, codec.pad_id)
    compare_training("sft", config, trainer, config.steps, plain_step, lambda rows: sum(data[rows]["length"]))
    engine.destroy()


def plain_train_step(
    trainer: SupervisedTrainer[SFTConfig, SFTBatch], pad_id: int, micro_batches: Sequence[MicroBatch]
) -> StepMetrics:
    """An optimizer step with transformers' own loss over all positions, of rows padded to --max_seq_len."""
    engine, config = trainer.engine, trainer.task.config
    batches = [
        padded(trainer.task.collate(trainer.train, batch, pad_id), config.max_seq_len, pad_id)
        for batch in micro_batches
    ]
    tokens = global_sum(torch.stack([batch.loss_mask[:, 1:].sum() for batch in batches]).sum())

    def loss_of(batch: TokenBatch) -> torch.Tensor:
        labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
        outputs = engine(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=labels,
            use_cache=False,
            num_items_in_batch=tokens,
        )
        return outputs.loss

    loss = accumulate(engine, batches, loss_of)
    engine.step()
    return {"loss": float(global_sum(loss)), "gradient_norm": gradient_norm(engine)}


def padded(batch: SFTBatch, width: int, pad_id: int) -> TokenBatch:
    """Rows that share no sequence, padded to `width`, on this rank's device."""
    assert isinstance(batch, TokenBatch)  # micro-batches of a fixed size are not packed
    return TokenBatch(
        padded_to(batch.input_ids, width, pad_id),
        padded_to(batch.attention_mask, width, 0),
        padded_to(batch.loss_mask, width, False),
        batch.lengths,
    ).to(device())


if __name__ == "__main__":
    sys.exit(run_program(main))
