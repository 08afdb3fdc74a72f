"""Step 2: the product's batching against pairs padded to --max_seq_len. --help says all."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import require_environment

    require_environment()

import torch
from torch.nn import functional as F

from benchmarks.inputs import BenchmarkOptions, random_model, with_data
from benchmarks.plain import padded_to
from benchmarks.supervised import compare_training
from common.artifacts.compatibility import open_codec
from common.artifacts.tracking import quiet_libraries
from common.batching.collate import PairBatch
from common.batching.sampler import MicroBatch
from common.config.parser import PathName, option, parse
from common.runtime.distributed import device, global_sum, seed_rank
from common.runtime.program import run_program, start
from common.supervised.run import Inputs, build_engine
from common.supervised.trainer import SupervisedTrainer
from common.training.engine import accumulate, gradient_norm
from common.training.metrics import StepMetrics
from step2_reward.config import RewardConfig
from step2_reward.task import RewardTask


@dataclass(frozen=True, kw_only=True)
class RewardBenchmark(BenchmarkOptions, RewardConfig):
    """Step 2, by its own options"""

    model_name_or_path: PathName = option("random:opt-2x128", "the model to train")
    max_seq_len: int = option(256, "longest row; the plain way pads to it", unit="tokens", low=2)
    steps: int = option(8, "optimizer steps in a run", low=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, prepare, build, compare."""
    config = with_data(parse(RewardBenchmark, argv))
    config = replace(config, learning_rate=0.0, lora_learning_rate=0.0, dropout=0.0, margin=0.0, centring_coef=0.0)
    source = random_model(config.model_name_or_path, "--model_name_or_path", config)
    codec = open_codec(config, source)
    task = RewardTask(config)
    inputs = Inputs(source, codec, task.prepare(codec))
    data = inputs.data.train
    quiet_libraries(config.output_dir)
    start(config.timeout, config.seed)
    engine = build_engine(task, config, inputs, total_steps=config.steps)
    seed_rank(config.seed)
    trainer = SupervisedTrainer(task, engine, data, data, task.batching(engine, data, config, codec.pad_id), [])
    plain_step = partial(plain_train_step, trainer, codec.pad_id)
    compare_training("reward", config, trainer, config.steps, plain_step, lambda rows: real_tokens(data[rows]))
    engine.destroy()


def plain_train_step(
    trainer: SupervisedTrainer[RewardConfig, PairBatch], pad_id: int, micro_batches: Sequence[MicroBatch]
) -> StepMetrics:
    """An optimizer step of pairs padded to --max_seq_len; scores are read at the last token of each row."""
    engine, width = trainer.engine, trainer.task.config.max_seq_len
    batches = [padded(trainer.task.collate(trainer.train, batch, pad_id), width, pad_id) for batch in micro_batches]
    pairs = global_sum(torch.stack([batch.real.sum() for batch in batches]).sum())

    def loss_of(batch: PairBatch) -> torch.Tensor:
        numbers = engine(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        chosen, rejected = numbers.gather(1, (batch.lengths - 1)[:, None]).squeeze(1).chunk(2)
        return -(F.logsigmoid(chosen - rejected) * batch.real).sum() / pairs

    loss = accumulate(engine, batches, loss_of)
    engine.step()
    return {"loss": float(global_sum(loss)), "gradient_norm": gradient_norm(engine)}


def padded(batch: PairBatch, width: int, pad_id: int) -> PairBatch:
    """Pairs padded to `width`, on this rank's device."""
    return replace(
        batch,
        input_ids=padded_to(batch.input_ids, width, pad_id),
        attention_mask=padded_to(batch.attention_mask, width, 0),
    ).to(device())


def real_tokens(pairs: Mapping[str, list[list[int]]]) -> int:
    """Tokens of both rows of all pairs."""
    return sum(
        2 * len(prompt) + len(chosen) + len(rejected)
        for prompt, chosen, rejected in zip(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"])
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
