"""Step 1: supervised fine-tuning of the actor. `deepspeed --num_gpus N step1_sft/main.py --help` says everything."""

import sys
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: this clone's packages, not those of another that is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import require_environment

    require_environment()
    from common.runtime import watchdog

    watchdog.start()


from common.artifacts.export import export_model
from common.artifacts.publish import data_request, open_codec, open_run, publishing, report_done, say_data, step_sampler
from common.batching.sampler import StepSampler, evaluation_batches
from common.checkpoints.manager import Checkpoints, TrainingState
from common.config.parser import parse
from common.data.prepare import PreparedData, agree_on, prepare_many
from common.data.tokenization import Codec
from common.models.loading import check_language_model, check_max_length, load_causal_lm, resolve_model
from common.models.lora import add_lora
from common.runtime.distributed import rank, run_program, say, seed_rank, start, world_size
from common.training.engine import (
    EngineSettings,
    OptimizerSettings,
    check_engine_options,
    deepspeed_config,
    training_engine,
)
from common.training.loop import SupervisedLoop
from common.training.memory import advising_on_memory, fit_micro_batches, named_when_out_of_memory
from step1_sft.config import SFTConfig
from step1_sft.packing import packing_of
from step1_sft.trainer import SFTTrainer


def main(argv=None) -> None:
    """Parse, prepare, build, train, save."""
    config = parse(SFTConfig, argv, prog="step1_sft/main.py")
    check_engine_options(config)
    source = resolve_model(
        config.model_name_or_path, "--model_name_or_path", config.data_output_path, config.merge_adapter
    )
    check_max_length(source, "--model_name_or_path", config.max_seq_len, "--max_seq_len", config.trust_remote_code)
    check_language_model(source, "--model_name_or_path", config.trust_remote_code)
    codec = open_codec(config, source, "--model_name_or_path")
    data = prepare_demonstrations(config, codec)
    say_data(data)

    tracker = open_run(config)
    start(config.timeout, config.seed)
    agree_on(data)
    checkpoints = Checkpoints(config, [data.key])
    found = checkpoints.find()
    loop = SupervisedLoop.from_config(config, step_sampler(config, data.train), tracker)
    with advising_on_memory(config), named_when_out_of_memory("loading the model"):
        engine = build_engine(config, source, codec, loop.scheduled_steps)
    trainer = SFTTrainer(
        engine,
        data.train,
        data.eval,
        evaluation_batches(
            data.eval["length"], config.per_device_eval_batch_size, world_size(), rank(), config.eval_iters or None
        ),
        codec.pad_id,
        config.train_on_prompt,
        config.max_skipped_steps,
    )
    fitted = fit_micro_batches(
        config,
        checkpoints.saved_value(found, "max_tokens"),
        [engine],
        trainer.probe,
        max(data.train["length"]),
        config.per_device_train_batch_size * config.gradient_accumulation_steps,
    )
    loop.sampler = packing_sampler(fitted, trainer) if config.packing else step_sampler(fitted, data.train)
    seed_rank(config.seed)

    state = TrainingState.of_one_engine(engine, trainer.step, max_tokens=fitted.max_tokens_per_micro_batch)
    with checkpoints.reporting_last_good(), advising_on_memory(config):
        done = checkpoints.restore(found, state, tracker)
        metrics = loop.run(trainer.train_step, trainer.evaluate, done, checkpoints.on_step_end)
        tracker.samples("after", trainer.samples(codec))  # before the result: what fails here must not fail that
        with publishing(config, codec, {"model": engine}, step="sft", base=config.model_name_or_path, data=data):
            export_model(engine, codec, config.output_dir, Path(config.output_dir) / "adapter")
    report_done(tracker, loop.total_steps, metrics, config.output_dir)
    checkpoints.discard()
    engine.destroy()


def prepare_demonstrations(config: SFTConfig, codec: Codec) -> PreparedData:
    """This step's part of the data, and all of the data that is given to it alone."""
    request = data_request(config, "demonstration", config.max_seq_len, "--max_seq_len")
    requests = [request]
    if whole := config.unsplit_sources():
        requests.append(replace(request, data_path=whole, phase=None))
    return prepare_many(requests, codec)


def packing_sampler(config: SFTConfig, trainer: SFTTrainer) -> StepSampler:
    """Steps of packed rows; where the model does not compute the same for them, of rows of like length."""
    trainer.packing = packing_of(trainer.engine, config.max_seq_len)
    if trainer.packing is not None:
        say(f"note: rows that share a sequence are kept apart by {trainer.packing.value}")
        return step_sampler(config, trainer.train, pack_to=config.max_seq_len)
    tokens = config.max_tokens_per_micro_batch or config.per_device_train_batch_size * config.max_seq_len
    say(
        f"note: {type(trainer.engine.module).__name__} does not keep packed rows apart, so rows of like length make "
        f"micro-batches of up to {tokens} tokens instead"
    )
    return step_sampler(replace(config, max_tokens_per_micro_batch=tokens), trainer.train)


def build_engine(config: SFTConfig, source: str, codec: Codec, total_steps: int):
    """The model, with adapters if asked for, in a DeepSpeed engine that trains it."""
    settings = EngineSettings.from_config(config)
    model = load_causal_lm(
        source,
        "--model_name_or_path",
        codec,
        dtype=settings.dtype,
        ds_config=deepspeed_config(settings),
        dropout=config.dropout_probability,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
    )
    if config.lora_dim:
        add_lora(
            model,
            dim=config.lora_dim,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            modules=config.lora_module_name,
            flag="--lora_module_name",
            seed=config.seed,
            base_name=source if config.merge_adapter else config.model_name_or_path,
        )
    return training_engine(model, settings, OptimizerSettings.from_config(config, total_steps))


if __name__ == "__main__":
    sys.exit(run_program(main))
