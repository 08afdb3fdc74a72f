"""Step 2: the reward model. `deepspeed --num_gpus N step2_reward/main.py --help` says everything."""

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
from common.batching.sampler import evaluation_batches
from common.checkpoints.manager import Checkpoints, TrainingState
from common.config.parser import parse
from common.data.prepare import agree_on, prepare
from common.data.tokenization import Codec
from common.errors import UserError
from common.models.loading import check_max_length, gives_scores, load_scalar_model, resolve_model
from common.models.lora import add_lora
from common.runtime.distributed import rank, run_program, seed_rank, start, world_size
from common.training.engine import (
    EngineSettings,
    OptimizerSettings,
    check_engine_options,
    deepspeed_config,
    training_engine,
)
from common.training.loop import SupervisedLoop
from common.training.memory import advising_on_memory, fit_micro_batches, named_when_out_of_memory
from step2_reward.config import RewardConfig
from step2_reward.trainer import RewardTrainer


def main(argv=None) -> None:
    """Parse, prepare, build, train, save."""
    config = parse(RewardConfig, argv, prog="step2_reward/main.py")
    check_engine_options(config)
    source = resolve_model(
        config.model_name_or_path, "--model_name_or_path", config.data_output_path, config.merge_adapter
    )
    check_max_length(source, "--model_name_or_path", config.max_seq_len, "--max_seq_len", config.trust_remote_code)
    gives_scores(source, "--model_name_or_path", config.trust_remote_code)  # with one score, if it has any
    codec = open_codec(config, source, "--model_name_or_path")
    request = data_request(config, "comparison", config.max_seq_len, "--max_seq_len")
    data = prepare(replace(request, pairs_per_prompt=config.pairs_per_prompt), codec)
    say_data(data)
    if not len(data.eval):
        raise UserError(
            "no pair is held out, so the scores' mean and spread cannot be measured: raise "
            "--eval_fraction or give more data"
        )

    tracker = open_run(config)
    start(config.timeout, config.seed)
    agree_on(data)
    checkpoints = Checkpoints(config, [data.key])
    found = checkpoints.find()
    loop = SupervisedLoop.from_config(config, step_sampler(config, data.train), tracker)
    with advising_on_memory(config), named_when_out_of_memory("loading the model"):
        engine = build_engine(config, source, codec, loop.scheduled_steps)
    trainer = RewardTrainer(
        engine,
        data.train,
        data.eval,
        evaluation_batches(
            data.eval["length"], config.per_device_eval_batch_size, world_size(), rank(), config.eval_iters or None
        ),
        codec.pad_id,
        config.margin,
        config.centring_coef,
        config.max_skipped_steps,
    )
    fitted = fit_micro_batches(
        config,
        checkpoints.saved_value(found, "max_tokens"),
        [engine],
        trainer.probe,
        2 * max(data.train["length"]),  # a pair is two sequences
        config.per_device_train_batch_size * config.gradient_accumulation_steps,
    )
    loop.sampler = step_sampler(fitted, data.train)
    seed_rank(config.seed)

    state = TrainingState.of_one_engine(engine, trainer.step, max_tokens=fitted.max_tokens_per_micro_batch)
    with checkpoints.reporting_last_good(), advising_on_memory(config):
        done = checkpoints.restore(found, state, tracker)
        metrics = loop.run(trainer.train_step, trainer.evaluate, done, checkpoints.on_step_end)
        tracker.samples("after", trainer.samples(codec))  # before the result: what fails here must not fail that
        with publishing(
            config,
            codec,
            {"model": engine},
            step="reward",
            base=config.model_name_or_path,
            data=data,
            score_mean=metrics["score_mean"],
            score_std=metrics["score_std"],
        ):
            export_model(engine, codec, config.output_dir, Path(config.output_dir) / "adapter")
    report_done(tracker, loop.total_steps, metrics, config.output_dir)
    checkpoints.discard()
    engine.destroy()


def build_engine(config: RewardConfig, source: str, codec: Codec, total_steps: int):
    """The model with a score head, and adapters if asked for, in a DeepSpeed engine that trains it."""
    settings = EngineSettings.from_config(config)
    model = load_scalar_model(
        source,
        "--model_name_or_path",
        codec,
        dtype=settings.dtype,
        seed=config.seed,
        ds_config=deepspeed_config(settings),
        dropout=config.dropout_probability,
        gradient_checkpointing=config.gradient_checkpointing,
        trust_remote_code=config.trust_remote_code,
    )
    if config.lora_dim:
        add_lora(
            model.classifier,
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
