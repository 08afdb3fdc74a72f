"""From the options and the inputs of a run to its trainer: the engines, micro-batches that fit into memory."""

from __future__ import annotations

from dataclasses import replace

from common.artifacts.run import Run
from common.training.memory import MAX_TOKENS, fit_micro_batches, named_when_out_of_memory
from common.training.timing import PhaseClock
from step3_ppo.config import PPOConfig
from step3_ppo.inputs import RunInputs
from step3_ppo.learner import Learner
from step3_ppo.models import PPOModels, build_models
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
    saved_tokens = run.checkpoints.saved_value(run.checkpoint, MAX_TOKENS)
    fitted = fitted_config(config, models, max(prompts["length"]), codec.pad_id, saved_tokens)
    texts = text_batches(fitted, inputs.texts.train, codec) if inputs.texts else None
    return PPOTrainer(models, reward or TokenRewardModel(models, fitted), fitted, codec, prompts, texts, inputs.scale)


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
