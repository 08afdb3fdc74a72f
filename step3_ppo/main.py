"""Step 3: PPO of the actor against the reward model. `deepspeed --num_gpus N step3_ppo/main.py --help` says all."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count, islice
from math import ceil
from pathlib import Path

if __package__ in (None, ""):  # run as a file: this clone's packages, not those of another that is installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import begin_program

    begin_program(trains=True)

from datasets import Dataset

from common.artifacts.compatibility import open_codec, read_calibration
from common.artifacts.export import export_model
from common.artifacts.model_source import resolve_model
from common.artifacts.publish import publishing
from common.artifacts.run import open_run, report_done, say_data
from common.artifacts.split_rule import data_request
from common.batching.collate import TokenBatch, collate_texts
from common.batching.sampler import StepSampler
from common.checkpoints.manager import Checkpoints, TrainingState
from common.config.parser import parse
from common.data.prepare import PreparedData, agree_on, prepare
from common.data.request import DataRequest
from common.data.tokenization import Codec
from common.errors import named_by
from common.models.calibration import RAW, Calibration
from common.models.loading import check_language_model, check_length, gives_scores
from common.paths import writing_to
from common.runtime.distributed import rank, say, world_size
from common.runtime.program import run_program, start
from common.training.engine import check_engine_options
from common.training.memory import advising_on_memory, fit_micro_batches, named_when_out_of_memory
from common.training.timing import PhaseClock
from step3_ppo.config import PPOConfig
from step3_ppo.generation.sampling import Sampling
from step3_ppo.learner import Learner
from step3_ppo.loop import run_iterations
from step3_ppo.models import PPOModels, build_models
from step3_ppo.trainer import PPOTrainer


def main(argv=None) -> None:
    """Parse, prepare, build, train, save."""
    config = parse(PPOConfig, argv, prog="step3_ppo/main.py")
    check_engine_options(config)
    with writing_to("--data_output_path", config.data_output_path):
        with named_by("--actor_model_name_or_path"):
            actor = resolve_model(config.actor_model_name_or_path, config.data_output_path, config.merge_adapter)
            check_language_model(actor, config.trust_remote_code)
        with named_by("--critic_model_name_or_path"):
            critic = resolve_model(config.critic_model_name_or_path, config.data_output_path, config.merge_adapter)
            gives_scores(critic, config.trust_remote_code)  # refuses a classifier of several labels
    for source, flag in ((actor, "--actor_model_name_or_path"), (critic, "--critic_model_name_or_path")):
        with named_by(f"--max_prompt_seq_len and --max_answer_seq_len are too large for {flag}"):
            check_length(source, config.max_prompt_seq_len + config.max_answer_seq_len, config.trust_remote_code)
    codec = open_codec(config, actor, "--actor_model_name_or_path")
    calibration = read_calibration(config, codec, critic)
    with config.naming_flags("--max_prompt_seq_len"):
        data = prepare(data_request(config, "prompt", config.max_prompt_seq_len), codec)
    say_data(data)
    with config.naming_flags("--max_prompt_seq_len and --max_answer_seq_len"):
        texts = prepare(text_request(config), codec) if config.unsupervised_dataset_name else None
    warn(config)

    tracker = open_run(config, model_parts(config))
    start(config.timeout, config.seed)
    sources = [data, *([texts] if texts else [])]
    agree_on(*sources)
    checkpoints = Checkpoints(config, [source.key for source in sources])
    found = checkpoints.find()
    sampler = prompt_sampler(config, data.train)
    scheduled = min(sampler.steps_per_epoch * config.num_train_epochs, config.max_iterations or sys.maxsize)
    iterations = min(scheduled, config.stop_after or sys.maxsize)
    with advising_on_memory(config), named_when_out_of_memory("loading the models"):
        models = build_models(
            config, codec, actor, critic, calibration or RAW, optimizer_steps(config, data.train, scheduled)
        )
    longest = max(data.train["length"])
    fitted = fit_micro_batches(
        config,
        checkpoints.saved_value(found, "max_tokens"),
        [models.actor, models.critic],
        lambda rows: Learner(models, config, PhaseClock()).probe(rows, longest, codec.pad_id),
        longest + config.max_answer_seq_len,
        config.per_device_training_batch_size * config.gradient_accumulation_steps,
    )
    if config.auto_micro_batch:  # which measured what fits beside no keys and values
        fitted = replace(fitted, release_inference_cache=True)
    trainer = PPOTrainer(
        models,
        fitted,
        codec,
        data.train,
        evaluated(config, data.eval),
        text_batches(fitted, texts.train, codec) if texts else None,
        calibration,
    )

    with checkpoints.reporting_last_good(), advising_on_memory(config):
        done = checkpoints.restore(found, training_state(models, trainer), tracker)
        metrics = run_iterations(trainer, sampler, iterations, tracker, done, checkpoints.on_step_end)
        save(config, models, codec, trainer.calibration, data)
    report_done(tracker, iterations, metrics, config.output_dir)
    checkpoints.discard()
    models.destroy()


def evaluated(config: PPOConfig, held_out: Dataset) -> Dataset:
    """--eval_prompts of the held-out prompts, from all over: sources, and their test data, lie one after another."""
    rows = min(config.eval_prompts, len(held_out))
    return held_out.select([number * len(held_out) // rows for number in range(rows)])


def training_state(models: PPOModels, trainer: PPOTrainer) -> TrainingState:
    """All that must be as it was for a resumed run to go on exactly."""
    average = {"tensors": models.ema.tensors, "reshape": models.ema.reshape} if models.ema is not None else {}
    return TrainingState(
        {"actor": models.actor, "critic": models.critic},
        **average,
        state_dict=trainer.state_dict,
        load_state_dict=trainer.load_state_dict,
        last_step_applied=trainer.learner.step.last_step_applied,
    )


def prompt_sampler(config: PPOConfig, prompts: Dataset) -> StepSampler:
    """An iteration's prompts; enough of them for one whole optimizer step, however the recipe's batches divide."""
    rollout_batches = config.rollout_batches_per_iteration
    if rollout_batches > config.generation_batches:
        say(
            f"note: one optimizer step takes {config.per_device_training_batch_size} x "
            f"{config.gradient_accumulation_steps} answers per rank, so each iteration makes {rollout_batches} rollout "
            f"batches of {config.per_device_generation_batch_size}, not {config.generation_batches}"
        )
    return StepSampler(
        prompts["length"],
        rows_per_micro_batch=config.per_device_generation_batch_size,
        micro_batches_per_step=rollout_batches,
        world_size=world_size(),
        rank=rank(),
        seed=config.seed,
    )


def optimizer_steps(config: PPOConfig, prompts: Dataset, iterations: int) -> int:
    """How often each engine steps in so many iterations.

    One iteration of an epoch, and not always its last, has what is left of the prompts, and so perhaps fewer steps.
    """
    rows = config.per_device_generation_batch_size * config.rollout_batches_per_iteration * world_size()
    on_one_rank = StepSampler(
        prompts["length"], rows_per_micro_batch=rows, micro_batches_per_step=1, world_size=1, rank=0, seed=config.seed
    )
    steps = chain.from_iterable(map(on_one_rank.epoch, count()))
    return sum(optimizer_steps_per_iteration(config, sum(batch.real)) for (batch,) in islice(steps, iterations))


def optimizer_steps_per_iteration(config: PPOConfig, prompts: int) -> int:
    """How often each engine steps in an iteration that no target_kl cuts short."""
    rows = config.per_device_generation_batch_size * config.rollout_batches_per_iteration * world_size()
    per_step = config.per_device_training_batch_size * config.gradient_accumulation_steps * world_size()
    return config.ppo_epochs * ceil(min(rows, prompts) * config.answers_per_prompt / per_step)


def text_request(config: PPOConfig) -> DataRequest:
    """The plain text of the pre-training mix; all of it, since it has no prompts to keep apart."""
    return DataRequest(
        data_path=config.text_sources(),
        kind="text",
        phase=None,
        eval_fraction=0.0,
        max_rows=config.max_rows,
        columns=config.columns or None,
        max_tokens=config.max_prompt_seq_len + config.max_answer_seq_len,
        max_bad_fraction=config.max_bad_rows,
        cache_dir=config.data_output_path,
    )


def text_batches(config: PPOConfig, texts: Dataset, codec: Codec) -> Iterator[list[TokenBatch]]:
    """Endless plain text: for every optimizer step as many rows as it has answers."""
    sampler = StepSampler(
        texts["length"],
        rows_per_micro_batch=config.per_device_training_batch_size,
        micro_batches_per_step=config.gradient_accumulation_steps,
        world_size=world_size(),
        rank=rank(),
        seed=config.seed,
        max_tokens=config.max_tokens_per_micro_batch,
    )
    for epoch in count():
        for micro_batches in sampler.epoch(epoch):
            yield [collate_texts(texts, micro_batch, codec.pad_id) for micro_batch in micro_batches]


def warn(config: PPOConfig) -> None:
    """Say what is allowed but rarely meant."""
    if Sampling.from_config(config).truncated:
        say(
            "warning: with --top_p, --top_k or --min_answer_seq_len answers are not sampled from the policy that is "
            "trained: the ratio of new to old policy is then only approximate"
        )


def model_parts(config: PPOConfig) -> list[str]:
    """The directories of the result's models."""
    return ["actor", "critic", *(["ema"] if config.enable_ema else [])]


def save(config: PPOConfig, models: PPOModels, codec: Codec, calibration: Calibration, data: PreparedData) -> None:
    """actor/, critic/ and, if it was kept, ema/, each a directory that transformers loads."""
    output = Path(config.output_dir)
    engines = {"actor": models.actor, "critic": models.critic}
    with publishing(
        config,
        codec,
        engines,
        step="ppo",
        base=config.actor_model_name_or_path,
        data=data,
        parts=model_parts(config),
        score_mean=calibration.mean,
        score_std=calibration.std,
    ):
        export_model(models.actor, codec, output / "actor", output / "adapter" / "actor")
        export_model(models.critic, codec, output / "critic", output / "adapter" / "critic")
        if models.ema is not None:
            with models.ema.swapped_in():
                export_model(models.actor, codec, output / "ema")


if __name__ == "__main__":
    sys.exit(run_program(main))
