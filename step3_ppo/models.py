"""The four models of PPO: actor, reference, critic, scorer.

Each has its own engine with its own ZeRO stage; but a LoRA actor is its own reference, and a LoRA critic its own
scorer, with the adapters off. So with LoRA there are two base models in memory, not four.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

from common.batching.collate import unmasked
from common.data.tokenization import Codec
from common.errors import named_by
from common.models.calibration import RAW, Calibration
from common.models.loading import load_causal_lm, load_scalar_model
from common.models.logprobs import gather_response, response_log_probs, response_log_probs_and_entropy
from common.models.lora import adapters_disabled, add_lora
from common.models.scalar import score_at_last_token
from common.runtime.distributed import say
from common.training.engine import (
    EngineSettings,
    OptimizerSettings,
    deepspeed_config,
    frozen_engine,
    resolve_dtype,
    training_engine,
)
from common.training.optim import say_shortened_warmup
from step3_ppo.config import PPOConfig
from step3_ppo.ema import EMA
from step3_ppo.experience import Rollout

NO_DROPOUT = 0.0  # the ratio of new to old policy must be 1 before the first update


@dataclass
class PPOModels:
    """The engines, and the passes over a rollout that do not train.

    Attributes:
        actor, critic: trained.
        reference: the actor as it was at the start; None where that is the actor with its adapters off.
        scorer: the frozen reward model; None where that is the critic with its adapters off and the head it kept.
        ema: moving average of the actor's weights, if wanted.
        temperature: that responses are sampled at.
    """

    actor: object
    critic: object
    scorer: object | None
    reference: object | None
    ema: EMA | None
    temperature: float

    @torch.no_grad()
    def log_probs_and_entropy(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(B, R) log-probs of the response tokens under the actor, and its entropy where they stand, in nats."""
        return response_log_probs_and_entropy(
            self.actor, inputs_of(rollout), rollout.prompt_lengths, rollout.response_lengths, self.temperature
        )

    @torch.no_grad()
    def reference_log_probs(self, rollout: Rollout) -> Tensor:
        """(B, R) log-probs of the response tokens under the reference, in nats."""
        if self.reference is not None:
            return self._log_probs(self.reference, rollout)
        with adapters_disabled(self.actor.module):
            return self._log_probs(self.actor, rollout)

    @torch.no_grad()
    def values(self, rollout: Rollout) -> Tensor:
        """(B, R) values, each read where the logits emit the response token, in normalised score units."""
        return response_values(self.critic, rollout)

    @torch.no_grad()
    def scores(self, rollout: Rollout) -> Tensor:
        """(B,) raw scores of the reward model at the last token."""
        if self.scorer is not None:
            numbers = self.scorer(**inputs_of(rollout))
        else:
            with adapters_disabled(self.critic.module):
                numbers = self.critic(**inputs_of(rollout), reward=True)
        return score_at_last_token(numbers, rollout.lengths)

    def measure_values_in(self, calibration: Calibration) -> None:
        """From here on the critic's values are in this scale of the scores."""
        self.critic.module.calibration = calibration

    def destroy(self) -> None:
        """Take DeepSpeed's hooks and buffers off all models."""
        for engine in (self.actor, self.critic, self.scorer, self.reference):
            if engine is not None:
                engine.destroy()

    def _log_probs(self, engine, rollout: Rollout) -> Tensor:
        return response_log_probs(
            engine, inputs_of(rollout), rollout.prompt_lengths, rollout.response_lengths, self.temperature
        )


def inputs_of(rollout: Rollout) -> dict[str, Tensor]:
    """What every model reads of a rollout: prompts and responses."""
    return unmasked(rollout.tokens)


def response_values(critic, rollout: Rollout) -> Tensor:
    """(B, R) the critic's values at the response tokens."""
    return gather_response(critic(**inputs_of(rollout)), rollout.prompt_lengths, rollout.response_lengths)


def build_models(
    config: PPOConfig,
    codec: Codec,
    actor_source: str,
    critic_source: str,
    calibration: Calibration,
    optimizer_steps: int,
) -> PPOModels:
    """Load the four models and make their engines.

    Args:
        actor_source, critic_source: directory or hub name of the fine-tuned model and of the reward model.
        calibration: of the reward model; the critic starts in the scale of the shaped scores.
        optimizer_steps: of the whole run, for the learning-rate schedules.
    """
    dtype = resolve_dtype(config.dtype)
    say_shortened_warmup(config, optimizer_steps)
    _say_what_is_shared(config)

    def engine_settings(stage: int, offload: bool) -> EngineSettings:
        return EngineSettings(
            stage, dtype, config.per_device_training_batch_size, offload, config.max_grad_norm, config.deepspeed_config
        )

    def optimizer_settings(learning_rate: float, lora_learning_rate: float, decay: float) -> OptimizerSettings:
        return OptimizerSettings(
            learning_rate, lora_learning_rate, decay, config.lr_scheduler_type, config.num_warmup_steps, optimizer_steps
        )

    def load_actor(settings: EngineSettings, trainable: bool):
        with named_by("--actor_model_name_or_path"):
            return load_causal_lm(
                actor_source,
                codec,
                dtype=dtype,
                dropout=NO_DROPOUT,
                ds_config=deepspeed_config(settings, trainable),
                trust_remote_code=config.trust_remote_code,
                gradient_checkpointing=trainable and config.actor_gradient_checkpointing,
            )

    def load_critic(settings: EngineSettings, trainable: bool, calibration: Calibration):
        with named_by("--critic_model_name_or_path"):
            return load_scalar_model(
                critic_source,
                codec,
                dtype=dtype,
                dropout=NO_DROPOUT,
                ds_config=deepspeed_config(settings, trainable),
                trust_remote_code=config.trust_remote_code,
                gradient_checkpointing=trainable and config.critic_gradient_checkpointing,
                calibration=calibration,
                seed=config.seed,
            )

    actor_settings = engine_settings(config.actor_zero_stage, config.offload)
    critic_settings = engine_settings(config.critic_zero_stage, config.offload)
    actor = load_actor(actor_settings, trainable=True)
    if config.actor_lora_dim:
        with named_by("--actor_lora_module_name"):
            add_lora(
                actor,
                dim=config.actor_lora_dim,
                alpha=config.actor_lora_alpha,
                dropout=NO_DROPOUT,
                modules=config.actor_lora_module_name,
                base_name=actor_source,
                seed=config.seed,
            )
    critic = load_critic(critic_settings, trainable=True, calibration=calibration)
    if config.critic_lora_dim:
        critic.keep_reward_head()
        with named_by("--critic_lora_module_name"):
            add_lora(
                critic.classifier,
                dim=config.critic_lora_dim,
                alpha=config.critic_lora_alpha,
                dropout=NO_DROPOUT,
                modules=config.critic_lora_module_name,
                base_name=critic_source,
                seed=config.seed,
            )
    actor_engine = training_engine(
        actor,
        actor_settings,
        optimizer_settings(config.actor_learning_rate, config.actor_lora_learning_rate, config.actor_weight_decay),
    )
    critic_engine = training_engine(
        critic,
        critic_settings,
        optimizer_settings(config.critic_learning_rate, config.critic_lora_learning_rate, config.critic_weight_decay),
    )

    reference = None
    if not config.actor_lora_dim:
        settings = engine_settings(
            _frozen_stage(config.actor_zero_stage, config.offload_reference_model), config.offload_reference_model
        )
        reference = frozen_engine(load_actor(settings, trainable=False), settings)
    scorer = None
    if not config.critic_lora_dim:
        settings = engine_settings(
            _frozen_stage(config.critic_zero_stage, config.offload_reward_model), config.offload_reward_model
        )
        scorer = frozen_engine(load_critic(settings, trainable=False, calibration=RAW), settings)
    ema = EMA(actor_engine.module, config.ema_decay) if config.enable_ema else None
    return PPOModels(actor_engine, critic_engine, scorer, reference, ema, config.temperature)


def _say_what_is_shared(config: PPOConfig) -> None:
    if config.actor_lora_dim and config.offload_reference_model:
        say(
            "note: --offload_reference_model has nothing to move: with --actor_lora_dim the reference is the actor "
            "with its adapters off"
        )
    if config.critic_lora_dim and config.offload_reward_model:
        say(
            "note: --offload_reward_model has nothing to move: with --critic_lora_dim the reward model is the critic "
            "with its adapters off"
        )


def _frozen_stage(trained_stage: int, offload: bool) -> int:
    """A frozen model follows its trained twin; only ZeRO-3 can keep it in CPU memory."""
    return 3 if trained_stage == 3 or offload else 0


@contextlib.contextmanager
def evaluating(models: PPOModels):
    """Within the context actor and critic are in evaluation mode: no gradient checkpointing."""
    models.actor.eval(), models.critic.eval()
    try:
        yield
    finally:
        models.actor.train(), models.critic.train()
