"""Step 3: a whole PPO iteration against the same iteration done the standard way. --help says all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import require_environment

    require_environment()

import torch

from benchmarks.inputs import BenchmarkOptions, random_model, with_data
from benchmarks.measure import Outcome, assert_close, compare, counted_positions, tolerance, weights_mib
from benchmarks.plain import LongTail, fixed_micro_batches, same_responses
from benchmarks.plain_ppo import PlainPPO, Result
from common.artifacts.compatibility import open_codec
from common.artifacts.split_rule import data_request
from common.artifacts.tracking import quiet_libraries
from common.batching.sampler import MicroBatch
from common.config.parser import PathName, option, parse
from common.data.prepare import prepare
from common.data.tokenization import Codec
from common.errors import UserError, named_by
from common.models.calibration import RAW
from common.models.engine import Engine
from common.models.loading import load_causal_lm, load_scalar_model
from common.runtime.distributed import is_main, world_size
from common.runtime.program import run_program, start
from common.training.engine import EngineSettings, deepspeed_config, frozen_engine, resolve_dtype
from common.training.timing import PhaseClock
from step3_ppo.calibration import ScoreScale
from step3_ppo.config import PPOConfig
from step3_ppo.generation.rollout import Rollout
from step3_ppo.models import build_models
from step3_ppo.reward import TokenRewardModel
from step3_ppo.schedule import optimizer_steps_per_iteration, prompt_sampler
from step3_ppo.trainer import PPOTrainer

COMPARED = ("reward", "kl", "policy_loss", "value_loss", "actor_gradient_norm", "critic_gradient_norm")

PPOBenchmarkT = TypeVar("PPOBenchmarkT", bound="PPOBenchmark")
Iteration = Callable[[], tuple[Result, Mapping[str, float]]]  # returns its result and the seconds of its phases


@dataclass(frozen=True, kw_only=True)
class PPOBenchmark(BenchmarkOptions, PPOConfig):
    """Step 3, by its own options"""

    actor_model_name_or_path: PathName = option("random:opt-4x256", "the actor")
    critic_model_name_or_path: PathName = option("random:opt-2x128", "the reward model; the critic's start")
    actor_zero_stage: int = option(0, "ZeRO stage; 3 also partitions the reference", choices=(0, 1, 2, 3))
    critic_zero_stage: int = option(0, "ZeRO stage; 3 also partitions the reward model", choices=(0, 1, 2, 3))
    max_prompt_seq_len: int = option(128, "longest prompt; others are cut on the left", unit="tokens", low=1)
    max_answer_seq_len: int = option(128, "longest answer", unit="tokens", low=1)
    min_answer_seq_len: int = option(1, "shortest answer", unit="tokens", low=1)
    draw_answer_lengths: bool = option(True, "random weights do not end their answers, so lengths are drawn")
    prompts: int = option(32, "prompts of an iteration, over all ranks", low=1)

    def validate(self) -> None:
        super().validate()
        if not self.estimator.needs_critic:
            raise UserError(f"--advantage {self.advantage} trains no critic, and both ways are compared with one")


def main(argv: Sequence[str] | None = None) -> None:
    """Both ways start from the same weights, and the learning rates are 0, so every run starts alike."""
    config = with_data(parse(PPOBenchmark, argv))
    config = one_step_per_iteration(config)
    actor = random_model(config.actor_model_name_or_path, "--actor_model_name_or_path", config)
    critic = random_model(config.critic_model_name_or_path, "--critic_model_name_or_path", config, scores=True)
    codec = open_codec(config, actor)
    data = prepare(data_request(config, "prompt", config.max_prompt_seq_len), codec).train
    quiet_libraries(config.output_dir)
    start(config.timeout, config.seed)
    prompts = prompt_sampler(config, data).epoch(0)[0]
    fixed = fixed_micro_batches(prompts, config.per_device_generation_batch_size)
    scale = ScoreScale(RAW)
    models = build_models(config, codec, actor, critic, scale, optimizer_steps_per_iteration(config, len(data)))
    trainer = PPOTrainer(models, TokenRewardModel(models, config), config, codec, data, None, scale)
    trainer.responder.sampling = LongTail(**asdict(trainer.responder.sampling))
    frozen = {} if config.only == "product" else standard_frozen_models(config, codec, actor, critic)
    trained = [models.actor, models.critic]
    variants = {
        "plain": counted(plain_iteration(trainer, frozen, fixed), trainer, [*trained, *frozen.values()]),
        "product": counted(
            product_iteration(trainer, prompts), trainer, [*trained, models.reward_model, models.reference]
        ),
    }
    agree = agreement(resolve_dtype(config.dtype))
    compare(config.chosen(variants), agree, rounds=config.rounds, steps=1, about=described(config))
    models.destroy()
    for engine in frozen.values():
        engine.destroy()


def plain_iteration(trainer: PPOTrainer, frozen: Mapping[str, Engine], prompts: Sequence[MicroBatch]) -> Iteration:
    """The standard way, with a reference and a reward model of its own."""

    def run() -> tuple[Result, Mapping[str, float]]:
        clock = PhaseClock()
        critic = trainer.models.critic
        assert critic is not None
        return PlainPPO(trainer, critic, **frozen).iteration(0, prompts, clock), clock.seconds

    return run


def product_iteration(trainer: PPOTrainer, prompts: Sequence[MicroBatch]) -> Iteration:
    """The product's way."""

    def run() -> tuple[Result, Mapping[str, float]]:
        metrics = trainer.iteration(0, prompts)
        assert trainer.latest is not None
        return (metrics, trainer.latest[0]), dict(trainer.clock.seconds)

    return run


def counted(
    iteration: Iteration, trainer: PPOTrainer, engines: Iterable[Engine | None]
) -> Callable[[], Outcome[Result]]:
    """The iteration as a variant; `engines` are those whose weights it needs."""
    weights = weights_mib(engines)

    def run() -> Outcome[Result]:
        with counted_positions(trainer.models.actor.module, training=True) as positions:
            (metrics, rollout), seconds = iteration()
        # Every rank holds the whole rollout; it is counted once.
        rows = len(rollout.tokens) if is_main() else 0
        return Outcome(
            rows,
            int(rollout.lengths[:rows].sum()) * trainer.config.ppo_epochs,
            sum(positions),
            (metrics, rollout),
            int(rollout.response_lengths[:rows].sum()),
            seconds,
            {"weights_mib": weights},
        )

    return run


def agreement(dtype: torch.dtype) -> Callable[[Result, Result], dict[str, float]]:
    """A function that raises AssertionError where two iterations differ; only in fp32 must all tokens be equal."""
    exact = dtype == torch.float32

    def agree(first: Result, other: Result) -> dict[str, float]:
        (metrics, rollout), (found, other_rollout) = first, other
        shares = same_responses(responses(rollout), responses(other_rollout), exact)
        if exact:  # else a token that differs by rounding changes all after it
            assert_close({name: metrics[name] for name in COMPARED}, found, tolerance(dtype))
        reward = found["reward"]
        assert reward is not None
        return shares | {"reward": reward}

    return agree


def described(config: PPOBenchmark) -> dict[str, object]:
    """What was asked for."""
    return {
        "benchmark": "ppo",
        "actor": config.actor_model_name_or_path,
        "critic": config.critic_model_name_or_path,
        "zero_stage": config.actor_zero_stage,
        "critic_zero_stage": config.critic_zero_stage,
        "dtype": str(resolve_dtype(config.dtype)).removeprefix("torch."),
        "lora_dim": config.actor.lora_dim,
        "critic_lora_dim": config.critic.lora_dim,
        "prompts": config.prompts,
        "longest_prompt": config.max_prompt_seq_len,
        "longest_response": config.max_answer_seq_len,
        "rows_per_micro_batch": config.per_device_training_batch_size,
        "max_tokens_per_micro_batch": config.max_tokens_per_micro_batch,
    }


def one_step_per_iteration(config: PPOBenchmarkT) -> PPOBenchmarkT:
    """All prompts in one rollout batch and one optimizer step, whose gradient can be compared; learning rates of 0."""
    if config.prompts % world_size():
        raise UserError(f"--prompts {config.prompts}: must be a multiple of the {world_size()} ranks")
    rows = config.prompts // world_size()
    answers = rows * config.answers_per_prompt
    no_learning: dict[str, Any] = {
        f"{model}_{rate}": 0.0 for model in ("actor", "critic") for rate in ("learning_rate", "lora_learning_rate")
    }
    return replace(
        config,
        per_device_generation_batch_size=rows,
        generation_batches=1,
        per_device_training_batch_size=min(answers, config.per_device_training_batch_size),
        gradient_accumulation_steps=-(-answers // config.per_device_training_batch_size),
        ppo_epochs=1,
        **no_learning,
    )


def standard_frozen_models(config: PPOBenchmark, codec: Codec, actor: str, critic: str) -> dict[str, Engine]:
    """A reference and a reward model of their own."""
    dtype = resolve_dtype(config.dtype)

    def settings(stage: int) -> EngineSettings:
        return EngineSettings(3 if stage == 3 else 0, dtype, config.per_device_training_batch_size)

    of_actor, of_critic = settings(config.actor_zero_stage), settings(config.critic_zero_stage)
    with named_by("--actor_model_name_or_path"):
        reference = load_causal_lm(
            actor,
            codec,
            dtype=dtype,
            dropout=0.0,
            ds_config=deepspeed_config(of_actor, trainable=False),
        )
    with named_by("--critic_model_name_or_path"):
        reward_model = load_scalar_model(
            critic,
            codec,
            dtype=dtype,
            dropout=0.0,
            seed=config.seed,
            ds_config=deepspeed_config(of_critic, trainable=False),
        )
    return {
        "reference": frozen_engine(reference, of_actor),
        "reward_model": frozen_engine(reward_model, of_critic),
    }


def responses(rollout: Rollout) -> list[list[int]]:
    """The tokens of every response."""
    return [
        row[start:end].tolist()
        for row, start, end in zip(rollout.tokens, rollout.prompt_lengths.tolist(), rollout.lengths.tolist())
    ]


if __name__ == "__main__":
    sys.exit(run_program(main))
