"""Compares the product's training steps with baseline steps over the same rows, for steps 1 and 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.measure import Outcome, assert_close, compare, counted_positions, tolerance
from benchmarks.plain import fixed_micro_batches
from common.batching.sampler import MicroBatch
from common.supervised.trainer import SupervisedTrainer

Step = Callable[[Sequence[MicroBatch]], dict]


def compare_training(
    benchmark: str,
    config,
    trainer: SupervisedTrainer,
    plain_step: Step,
    real_tokens: Callable[[list[int]], int],
) -> None:
    """Train the same rows in the same optimizer steps by both variants.

    The learning rate must be 0, so that every run starts from the same weights.

    Args:
        trainer: the product's.
        plain_step: an optimizer step over micro-batches of a fixed size; returns its loss and gradient norm.
        real_tokens: returns the number of tokens in the rows with these indices.
    """
    engine = trainer.engine
    steps = trainer.batching.sampler.epoch(0)[: config.steps]
    fixed = [fixed_micro_batches(step, config.per_device_train_batch_size) for step in steps]
    rows = [index for step in fixed for batch in step for index, real in zip(batch.indices, batch.real) if real]
    tokens = real_tokens(rows)
    dtype = next(engine.module.parameters()).dtype

    def measured(train_step: Step, micro_batches: Sequence[Sequence[MicroBatch]]) -> Callable[[], Outcome]:
        def run() -> Outcome:
            with counted_positions(engine.module, training=True) as positions:
                metrics = [train_step(step) for step in micro_batches]
            return Outcome(len(rows), tokens, sum(positions), metrics)

        return run

    def agree(first: list[dict], other: list[dict]) -> dict[str, float]:
        for metrics, other_metrics in zip(first, other, strict=True):
            names = ("loss", "gradient_norm")
            assert_close({name: metrics[name] for name in names}, other_metrics, tolerance(dtype))
        return {"loss": other[0]["loss"]}

    compare(
        config.chosen({"plain": measured(plain_step, fixed), "product": measured(trainer.train_step, steps)}),
        agree,
        rounds=config.rounds,
        steps=len(steps),
        about={
            "benchmark": benchmark,
            "model": config.model_name_or_path,
            "zero_stage": config.zero_stage,
            "dtype": str(dtype).removeprefix("torch."),
            "lora_dim": config.lora_dim,
            "max_seq_len": config.max_seq_len,
            "rows_per_micro_batch": config.per_device_train_batch_size,
            "micro_batches_per_step": config.gradient_accumulation_steps,
            "max_tokens_per_micro_batch": config.max_tokens_per_micro_batch,
            "packing": getattr(config, "packing", False),
        },
    )
