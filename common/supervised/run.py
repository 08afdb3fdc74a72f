"""Runs a supervised program from its options to its result. Steps 1 and 2 share it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic

from datasets import Dataset
from torch import nn

from common.artifacts.compatibility import open_codec
from common.artifacts.export import export_model
from common.artifacts.model_source import resolve_model
from common.artifacts.publish import publishing
from common.artifacts.run import Run, report_done, say_data, start_run
from common.batching.sampler import MicroBatch, evaluation_batches, steps_per_epoch
from common.checkpoints.training_state import TrainingState
from common.data.prepare import PreparedData
from common.data.tokenization import Codec
from common.errors import named_by
from common.models.added_token import AddedTokenError
from common.models.configuration import check_length
from common.models.engine import Engine
from common.models.lora import add_lora
from common.paths import writing_to
from common.runtime.distributed import rank, say, seed_rank, world_size
from common.supervised.config import SupervisedConfig
from common.supervised.streaming import Streaming, streamed_steps, with_place
from common.supervised.task import BatchT, ConfigT, SupervisedTask
from common.supervised.trainer import SupervisedTrainer, probe
from common.training.engine import (
    EngineSettings,
    OptimizerSettings,
    TrainedEngine,
    check_engine_options,
    deepspeed_config,
    frozen_engine,
    training_engine,
)
from common.training.loop import Steps, SupervisedLoop
from common.training.memory import MAX_TOKENS, advising_on_memory, fit_micro_batches, named_when_out_of_memory
from common.training.metrics import Metrics
from common.training.optim import CannotCompile


@dataclass(frozen=True)
class Inputs:
    """The checked inputs of a run.

    Attributes:
        source: directory or hub name of the model.
        data: the same on every rank.
        stream: the rows to train on, where they are streamed; `data` then is what their first ones gave.
    """

    source: str
    codec: Codec
    data: PreparedData
    stream: Streaming | None = None


@dataclass(frozen=True)
class Training(Generic[ConfigT, BatchT]):
    """What a run trains with: the trainer, the optimizer steps of the run, and what a checkpoint holds."""

    trainer: SupervisedTrainer[ConfigT, BatchT]
    steps: Steps
    state: TrainingState


def run_supervised(task: SupervisedTask[ConfigT, BatchT], config: ConfigT) -> Metrics:
    """Train `task` to its end, from the start or from a checkpoint. Returns the metrics of the last evaluation.

    Raises:
        UserError: an option, a file or a model cannot be used. Most of these are found before a model is loaded.
        TrainingFailure: the run cannot continue.
        AlreadyComplete: the result is in the output directory already.
    """
    inputs = read_inputs(task, config)
    run = start_run(config, inputs.data, pieces={"task": task})
    with run.tracker, advising_on_memory(config):
        training = build(task, config, inputs, run)
        trainer = training.trainer
        loop = SupervisedLoop.from_config(config, training.steps, run.tracker)
        saver = run.restore(training.state)
        with saver.reporting_last_good():
            metrics = loop.run(trainer.train_step, trainer.evaluate, saver.steps_done, saver.on_step_end)
            # Before the result is written: an error in the samples must not leave an incomplete result.
            run.tracker.samples("after", trainer.samples(inputs.codec))
            publish(task, config, inputs, trainer.engine, metrics)
        report_done(run.tracker, loop.total_steps, metrics, config.output_dir)
    run.checkpoints.discard()
    trainer.engine.destroy()
    return metrics


def read_inputs(task: SupervisedTask[ConfigT, BatchT], config: ConfigT) -> Inputs:
    """Check the paths and names in the options, and prepare the data. Loads no weights; ranks are not connected yet."""
    check_engine_options(config)
    with writing_to("--data_output_path", config.data_output_path), named_by("--model_name_or_path"):
        source = resolve_model(config.model_name_or_path, config.data_output_path, config.merge_adapter)
    with named_by("--model_name_or_path", {source: config.model_name_or_path}):
        task.check_model(source)
    with named_by("--max_seq_len is too large for --model_name_or_path", {source: config.model_name_or_path}):
        check_length(source, config.max_seq_len, config.trust_remote_code)
    with named_by("--model_name_or_path", {source: config.model_name_or_path}):
        codec = open_codec(config, source)
    with config.naming_flags():
        data = task.prepare(codec)
    say_data(data)
    stream = task.stream(codec, data)
    if stream is not None:
        say(
            f"note: these rows are a sample; training rows are read and shuffled while training, and as their number "
            f"is not known, the run is as long as it was told to be: {stream.steps:,} steps"
        )
    return Inputs(source, codec, data, stream)


def build_engine(
    task: SupervisedTask[ConfigT, BatchT], config: ConfigT, inputs: Inputs, total_steps: int
) -> TrainedEngine:
    """The model of the task, with adapters if asked for, in a DeepSpeed engine that trains it."""
    settings = EngineSettings.from_config(config)
    model = load_model(task, config, inputs, settings)
    if config.lora_dim:
        with named_by("--lora_module_name"), named_by("--add_eot_token", kind=AddedTokenError):
            add_lora(
                task.adapted_part(model),
                dim=config.lora_dim,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                modules=config.lora_module_name,
                seed=config.seed,
                base_name=inputs.source if config.merge_adapter else config.model_name_or_path,
            )
    with named_by("--offload needs", kind=CannotCompile):
        return training_engine(model, settings, OptimizerSettings.from_config(config, total_steps))


def load_model(
    task: SupervisedTask[ConfigT, BatchT],
    config: ConfigT,
    inputs: Inputs,
    settings: EngineSettings,
    trainable: bool = True,
) -> nn.Module:
    """The model that --model_name_or_path names, as the task loads it."""
    with named_by("--model_name_or_path", {inputs.source: config.model_name_or_path}):
        return task.load_model(
            inputs.source,
            inputs.codec,
            dtype=settings.dtype,
            ds_config=deepspeed_config(settings, trainable),
            dropout=config.dropout_probability if trainable else 0.0,
            gradient_checkpointing=trainable and config.gradient_checkpointing,
            trust_remote_code=config.trust_remote_code,
            quantize=config.quantize,
        )


def frozen_copy(task: SupervisedTask[ConfigT, BatchT], config: ConfigT, inputs: Inputs) -> Engine:
    """The model once more, as it is before training, in an engine that does not train it."""
    settings = EngineSettings.from_config(config)
    settings = replace(settings, zero_stage=3 if settings.zero_stage == 3 else 0)
    return frozen_engine(load_model(task, config, inputs, settings, trainable=False), settings)


def build(
    task: SupervisedTask[ConfigT, BatchT], config: ConfigT, inputs: Inputs, run: Run
) -> Training[ConfigT, BatchT]:
    """The trainer, with micro-batches that fit into memory, and what its checkpoints hold.

    Args:
        run: has found the checkpoint to go on from; nothing of it is loaded here but how micro-batches were cut.
    """
    pad_id = inputs.codec.pad_id
    with named_when_out_of_memory("loading the model"):
        steps = inputs.stream.steps if inputs.stream else scheduled_steps(config, len(inputs.data.train))
        engine = build_engine(task, config, inputs, steps)
        copy = partial(frozen_copy, task, config, inputs)
        data = task.annotated(engine, inputs.source, inputs.data, pad_id, copy)
    rows, held_out = data.train, data.eval
    fitted = fit_micro_batches(
        config,
        run.checkpoints.saved_value(run.checkpoint, MAX_TOKENS),
        [engine],
        partial(probe, task, engine, rows, pad_id),
        task.sequences_per_row * max(rows["length"]),
        config.per_device_train_batch_size * config.gradient_accumulation_steps,
    )
    batching = task.batching(engine, rows, fitted, pad_id)
    trainer = SupervisedTrainer(
        task,
        engine,
        rows,
        held_out,
        batching,
        evaluated_on_this_rank(held_out, config, batching.evaluation_pack_to),
        config.max_skipped_steps,
    )
    seed_rank(config.seed)
    state = TrainingState.of_one_engine(engine, trainer.step, **{MAX_TOKENS: fitted.max_tokens_per_micro_batch})
    if inputs.stream is None:
        return Training(trainer, batching.sampler, state)
    streamed = streamed_steps(inputs.stream, batching.sampler, config)
    trainer.train = streamed.rows
    return Training(trainer, streamed, with_place(state, streamed))


def scheduled_steps(config: SupervisedConfig, rows: int) -> int:
    """Optimizer steps of all epochs, over which the learning rate changes, also where the run stops early."""
    (batch,) = config.batches()
    return config.num_train_epochs * steps_per_epoch(rows, batch.rows * world_size())


def evaluated_on_this_rank(held_out: Dataset, config: SupervisedConfig, pack_to: int = 0) -> list[MicroBatch]:
    """This rank's batches of an evaluation of at most --eval_iters batches; for `pack_to` see `Batching`."""
    return evaluation_batches(
        held_out["length"], config.per_device_eval_batch_size, world_size(), rank(), config.eval_iters or None, pack_to
    )


def publish(
    task: SupervisedTask[ConfigT, BatchT], config: ConfigT, inputs: Inputs, engine: TrainedEngine, metrics: Metrics
) -> None:
    """Write the result: the model, its adapters, the tokenizer and the provenance."""
    with publishing(
        config,
        inputs.codec,
        {"model": engine},
        step=task.step,
        base=config.model_name_or_path,
        data=inputs.data,
        **task.provenance(metrics),
    ):
        export_model(engine, inputs.codec, config.output_dir, Path(config.output_dir) / "adapter")
