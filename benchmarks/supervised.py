"""What the benchmarks of steps 1 and 2 share: the product's training steps and plain ones over the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.inputs import BenchmarkOptions
from benchmarks.measure import (
    Outcome,
    assert_close,
    compare,
    counted_positions,
    optimizer_mib,
    tolerance,
    weights_mib,
)
from benchmarks.plain import fixed_micro_batches
from common.batching.sampler import MicroBatch
from common.supervised.trainer import SupervisedTrainer
from common.training.engine import resolve_dtype
from common.training.loop import TrainStep
from common.training.metrics import StepMetrics

Results = list[StepMetrics]  # of the optimizer steps of a run


def compare_training(
    benchmark: str,
    options: BenchmarkOptions,
    trainer: SupervisedTrainer[Any, Any],
    steps: int,
    plain_step: TrainStep,
    real_tokens: Callable[[list[int]], int],
) -> None:
    """Train the same rows in the same optimizer steps both ways; the learning rate must be 0, so that every run starts
    alike.

    Args:
        trainer: the product's.
        steps: optimizer steps in a run.
        plain_step: an optimizer step over micro-batches of a fixed size; returns its loss and gradient norm.
        real_tokens: of the rows with these numbers.
    """
    engine, config = trainer.engine, trainer.task.config
    batches = trainer.batching.sampler.epoch(0)[:steps]
    fixed = [fixed_micro_batches(step, config.per_device_train_batch_size) for step in batches]
    rows = [index for step in fixed for batch in step for index, real in zip(batch.indices, batch.real) if real]
    tokens = real_tokens(rows)
    dtype = resolve_dtype(config.dtype)

    def counted(train_step: TrainStep, micro_batches: Sequence[Sequence[MicroBatch]]) -> Callable[[], Outcome[Results]]:
        def run() -> Outcome[Results]:
            with counted_positions(engine.module, training=True) as positions:
                metrics = [train_step(step) for step in micro_batches]
            held = {"weights_mib": weights_mib([engine]), "optimizer_mib": optimizer_mib(engine)}
            return Outcome(len(rows), tokens, sum(positions), metrics, extra=held)

        return run

    def agree(first: Results, other: Results) -> dict[str, float]:
        for metrics, found in zip(first, other, strict=True):
            names = ("loss", "gradient_norm")
            assert_close({name: metrics[name] for name in names}, found, tolerance(dtype))
        loss = other[0]["loss"]
        assert loss is not None
        return {"loss": loss}

    compare(
        options.chosen({"plain": counted(plain_step, fixed), "product": counted(trainer.train_step, batches)}),
        agree,
        rounds=options.rounds,
        steps=len(batches),
        about={
            "benchmark": benchmark,
            "model": config.model_name_or_path,
            "zero_stage": config.zero_stage,
            "dtype": str(dtype).removeprefix("torch."),
            "lora_dim": config.lora_dim,
            "quantize": config.quantize,
            "max_seq_len": config.max_seq_len,
            "rows_per_micro_batch": config.per_device_train_batch_size,
            "micro_batches_per_step": config.gradient_accumulation_steps,
            "max_tokens_per_micro_batch": config.max_tokens_per_micro_batch,
            "packing": getattr(config, "packing", False),
        },
    )
