"""From the options and the inputs of a run to its trainer: the engines, micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from common.artifacts.run import Run
from common.errors import named_by
from common.models.engine import Engine
from common.rewards.batch import BatchReward
from common.rewards.text_model import TextRewardModel
from common.runtime.distributed import device
from common.training.engine import resolve_dtype
from common.training.memory import MAX_TOKENS, fit_micro_batches, named_when_out_of_memory
from common.training.timing import PhaseClock
from step3_ppo.combined import CombinedReward, RewardPart
from step3_ppo.config import PPOConfig
from step3_ppo.inputs import RunInputs
from step3_ppo.learner import Learner
from step3_ppo.models import PPOModels, build_models, reward_engine
from step3_ppo.reward import Reward, TokenRewardModel
from step3_ppo.schedule import optimizer_steps, scheduled_iterations, text_batches
from step3_ppo.trainer import PPOTrainer


def build_trainer(config: PPOConfig, inputs: RunInputs, run: Run, reward: Reward | None = None) -> PPOTrainer:
    """The engines of a run and the trainer that holds them. All ranks must call it.

    A run has found its checkpoint, or was refused, before it is here: no time is lost on engines that are not needed.

    Args:
        reward: scores the responses in the place of the reward model.
    """
    codec, prompts = inputs.codec, inputs.prompts.train
    with named_when_out_of_memory("loading the models"):
        steps = optimizer_steps(config, len(prompts), scheduled_iterations(config, len(prompts)))
        of_critic_alone = optimizer_steps(config, len(prompts), config.critic_warmup_iterations)
        models = build_models(config, codec, inputs.actor, inputs.critic, inputs.scale, steps, of_critic_alone)
        loaded = load_rewards(config, inputs)
    saved_tokens = run.checkpoints.saved_value(run.checkpoint, MAX_TOKENS)
    fitted = fitted_config(config, models, max(prompts["length"]), codec.pad_id, saved_tokens)
    texts = text_batches(fitted, inputs.texts.train, codec) if inputs.texts else None
    if inputs.rewards:
        scoring: Reward | CombinedReward = combined_reward(fitted, inputs, models, loaded)
    else:
        scoring = reward or TokenRewardModel(models, fitted)
    return PPOTrainer(models, scoring, fitted, codec, prompts, texts, inputs.scale)


def load_rewards(config: PPOConfig, inputs: RunInputs) -> dict[str, Engine | TextRewardModel]:
    """The reward models of --reward by their labels, but for one that is the LoRA critic with its adapters off."""
    loaded: dict[str, Engine | TextRewardModel] = {}
    shared = inputs.critic if config.estimator.needs_critic and config.critic.lora_dim else None
    for opened in inputs.rewards:
        source, spec = opened.source, opened.spec
        if source is None or opened.reads_ids and source == shared:
            continue
        if opened.reads_ids:
            loaded[spec.label] = reward_engine(config, inputs.codec, source, spec.name)
            continue
        with named_by("--reward", {source: spec.name}):
            loaded[spec.label] = TextRewardModel(
                source,
                dtype=resolve_dtype(config.dtype),
                device=device(),
                batch_size=config.reward_batch_size,
                max_tokens=config.reward_max_seq_len,
                offload=config.offload_reward_model,
                quantize=config.reward_quantize,
                trust_remote_code=config.trust_remote_code,
            )
    return loaded


def combined_reward(
    config: PPOConfig, inputs: RunInputs, models: PPOModels, loaded: Mapping[str, Engine | TextRewardModel]
) -> CombinedReward:
    """The rewards of --reward, as one."""
    parts = []
    for opened in inputs.rewards:
        spec, model = opened.spec, loaded.get(opened.spec.label)
        scorer: TokenRewardModel | BatchReward
        if opened.scorer is not None:
            scorer = opened.scorer
        elif isinstance(model, TextRewardModel):
            scorer = model
        else:
            scorer = TokenRewardModel(models, config, model)
        parts.append(RewardPart(spec.name, spec.label, spec.weight, scorer, opened.scale))
    return CombinedReward(parts, zero_if_failed=config.reward_errors == "zero")


def reward_piece(config: PPOConfig) -> type:
    """What gives the scores where the program brings no reward of its own: part of what a run is."""
    return CombinedReward if config.reward else TokenRewardModel


def fitted_config(
    config: PPOConfig, models: PPOModels, longest_prompt: int, pad_id: int, saved_tokens: int | None
) -> PPOConfig:
    """The config with --max_tokens_per_micro_batch as --auto_micro_batch finds it; unchanged where that is off.

    All ranks must call it.

    Args:
        longest_prompt: tokens of the longest prompt.
        saved_tokens: the value that an interrupted run used; None: measure.
    """
    learner = Learner(models, config, PhaseClock())
    fitted = fit_micro_batches(
        config,
        saved_tokens,
        list(models.trained().values()),
        lambda rows: learner.probe(rows, longest_prompt, pad_id),
        longest_prompt + config.max_answer_seq_len,
        config.per_device_training_batch_size * config.gradient_accumulation_steps,
    )
    # What fits was measured beside no keys and values.
    return replace(fitted, release_inference_cache=config.release_inference_cache or config.auto_micro_batch)
