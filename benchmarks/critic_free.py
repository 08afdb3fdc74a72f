"""Step 3: an iteration whose advantages need no critic against one that trains a critic. --help says all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.runtime.requirements import require_environment

    require_environment()

import torch

from benchmarks.inputs import random_model, with_data
from benchmarks.measure import assert_close, compare, tolerance
from benchmarks.plain import LongTail, same_responses
from benchmarks.plain_ppo import Result
from benchmarks.ppo import PPOBenchmark, counted, described, one_step_per_iteration, product_iteration, responses
from common.artifacts.compatibility import open_codec
from common.artifacts.split_rule import data_request
from common.artifacts.tracking import quiet_libraries
from common.config.parser import PathName, option, parse
from common.data.prepare import prepare
from common.models.calibration import RAW
from common.runtime.program import run_program, start
from common.training.engine import resolve_dtype
from step3_ppo.advantages import ESTIMATORS
from step3_ppo.calibration import ScoreScale
from step3_ppo.models import build_models
from step3_ppo.reward import TokenRewardModel
from step3_ppo.schedule import optimizer_steps_per_iteration, prompt_sampler
from step3_ppo.trainer import PPOTrainer

WITH, WITHOUT = "with_critic", "without_critic"


@dataclass(frozen=True, kw_only=True)
class CriticFreeBenchmark(PPOBenchmark):
    """Step 3 with a critic and without one, by its own options"""

    critic_free: str = option(
        "rloo",
        "the estimator without a critic; --advantage names the one with it",
        choices=tuple(name for name, estimator in ESTIMATORS.items() if not estimator.needs_critic),
    )
    critic_model_name_or_path: PathName = option("random:opt-4x256", "the reward model; the critic's start")
    answers_per_prompt: int = option(4, "answers to each prompt, in both ways", low=2)
    prompts: int = option(8, "prompts of an iteration, over all ranks", low=1)
    only: str | None = option(None, "measure this variant alone, for its memory", choices=(WITH, WITHOUT))


def main(argv: Sequence[str] | None = None) -> None:
    """Both ways write the same responses to the same prompts, and score them by the same reward model."""
    config = one_step_per_iteration(with_data(parse(CriticFreeBenchmark, argv)))
    actor = random_model(config.actor_model_name_or_path, "--actor_model_name_or_path", config)
    critic = random_model(config.critic_model_name_or_path, "--critic_model_name_or_path", config, scores=True)
    codec = open_codec(config, actor)
    data = prepare(data_request(config, "prompt", config.max_prompt_seq_len), codec).train
    quiet_libraries(config.output_dir)
    start(config.timeout, config.seed)
    prompts = prompt_sampler(config, data).epoch(0)[0]
    scale = ScoreScale(RAW)
    trainers, variants = [], {}
    for name, advantage in config.chosen({WITH: config.advantage, WITHOUT: config.critic_free}).items():
        own = replace(config, advantage=advantage)
        models = build_models(own, codec, actor, critic, scale, optimizer_steps_per_iteration(own, len(data)))
        trainer = PPOTrainer(models, TokenRewardModel(models, own), own, codec, data, None, scale)
        trainer.responder.sampling = LongTail(**asdict(trainer.responder.sampling))
        trainers.append(trainer)
        engines = [models.actor, models.critic, models.reward_model, models.reference]
        variants[name] = counted(product_iteration(trainer, prompts), trainer, engines)
    about = {
        **described(config),
        "benchmark": "critic_free",
        "advantage": config.advantage,
        "critic_free": config.critic_free,
        "answers_per_prompt": config.answers_per_prompt,
    }
    compare(variants, agreement(resolve_dtype(config.dtype)), rounds=config.rounds, steps=1, about=about)
    for trainer in trainers:
        trainer.destroy()


def agreement(dtype: torch.dtype) -> Callable[[Result, Result], dict[str, float]]:
    """A function that raises AssertionError where two iterations have other responses, or score them otherwise."""

    def agree(first: Result, other: Result) -> dict[str, float]:
        (metrics, rollout), (found, other_rollout) = first, other
        shares = same_responses(responses(rollout), responses(other_rollout), exact=True)
        assert_close({name: metrics[name] for name in ("reward", "kl")}, found, tolerance(dtype))
        return shares

    return agree


if __name__ == "__main__":
    sys.exit(run_program(main))
