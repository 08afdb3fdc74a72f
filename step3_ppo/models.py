"""Builds the models of PPO: actor, reference, critic, reward model.

Each has its own engine with its own ZeRO stage. But a LoRA actor with its adapters off is the reference, and a LoRA
critic with its adapters off is the reward model: with LoRA there are two base models in memory, not four. There is a
critic only where the advantage estimator needs one, and a reward model only where no other reward is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.batching.collate import unmasked
from common.config.groups import TrainedModelOptions
from common.data.tokenization import Codec
from common.errors import named_by
from common.models.added_token import AddedTokenError
from common.models.calibration import RAW
from common.models.encoder_decoder import model_inputs
from common.models.engine import Engine
from common.models.loading import load_causal_lm, load_scalar_model
from common.models.logprobs import gather_response, response_log_probs, response_log_probs_and_entropy
from common.models.lora import adapters_disabled, add_lora
from common.models.scalar import ScalarModel, Scale, score_at_last_token
from common.runtime.distributed import say
from common.training.engine import (
    EngineSettings,
    OptimizerSettings,
    TrainedEngine,
    deepspeed_config,
    frozen_engine,
    resolve_dtype,
    training_engine,
)
from common.training.optim import CannotCompile, say_shortened_warmup
from step3_ppo.config import PPOConfig
from step3_ppo.ema import EMA
from step3_ppo.generation.rollout import Rollout

NO_DROPOUT = 0.0  # the ratio of new to old policy must be 1 before the first update


@dataclass(frozen=True)
class PPOModels:
    """The engines, and the passes over a rollout that do not train.

    Attributes:
        actor: trained.
        critic: trained; None where the advantage estimator needs none.
        reference: frozen, the actor as it was at the start; None where that is the actor with its adapters off, and
            where the KL is measured nowhere.
        reward_model: frozen; None where that is the critic with its adapters off and the head it kept, and where the
            program brings a reward of its own.
        ema: moving average of the actor's weights, if wanted.
        temperature: at which responses are sampled.
    """

    actor: TrainedEngine
    critic: TrainedEngine | None
    reference: Engine | None
    reward_model: Engine | None
    ema: EMA | None
    temperature: float

    def trained(self) -> dict[str, TrainedEngine]:
        """The engines that learn, by name."""
        return {"actor": self.actor} if self.critic is None else {"actor": self.actor, "critic": self.critic}

    @torch.no_grad()
    def log_probs_and_entropy(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(B, R) log-probs of the response tokens under the actor, and its entropy where they stand, in nats."""
        return response_log_probs_and_entropy(
            self.actor,
            inputs_of(rollout),
            rollout.prompt_lengths,
            rollout.response_lengths,
            self.temperature,
            rollout.kept,
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
        """(B, R) values, each read where the logits emit the response token, in normalised score units.

        Raises:
            ValueError: there is no critic.
        """
        if self.critic is None:
            raise ValueError("there are no values: the advantage estimator needs no critic, so none is loaded")
        return response_values(self.critic, rollout)

    @torch.no_grad()
    def scores(self, rollout: Rollout) -> Tensor:
        """(B,) raw scores of the reward model at the last token."""
        if self.reward_model is not None:
            numbers = self.reward_model(**inputs_of(rollout))
        elif self.critic is not None:
            with adapters_disabled(self.critic.module):
                numbers = self.critic(**inputs_of(rollout), reward=True)
        else:
            raise ValueError("no reward model is loaded: the scores come from elsewhere")
        return score_at_last_token(numbers, rollout.lengths)

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks and buffers from all models."""
        for engine in (self.actor, self.critic, self.reward_model, self.reference):
            if engine is not None:
                engine.destroy()

    def _log_probs(self, engine: Engine, rollout: Rollout) -> Tensor:
        return response_log_probs(
            engine,
            inputs_of(rollout),
            rollout.prompt_lengths,
            rollout.response_lengths,
            self.temperature,
            rollout.kept,
        )


def inputs_of(rollout: Rollout) -> dict[str, Tensor]:
    """The inputs of a model for a rollout: prompts and responses."""
    return unmasked(rollout.tokens)


def response_values(critic: Engine, rollout: Rollout) -> Tensor:
    """(B, R) the critic's values at the response tokens."""
    inputs, before = model_inputs(critic, inputs_of(rollout), rollout.prompt_lengths, rollout.response_lengths)
    return gather_response(critic(**inputs), before, rollout.response_lengths)


def build_models(
    config: PPOConfig,
    codec: Codec,
    actor_source: str,
    critic_source: str | None,
    scale: Scale,
    optimizer_steps: int,
    of_critic_alone: int = 0,
) -> PPOModels:
    """Load the models that the options ask for, up to four, and make their engines.

    Args:
        actor_source, critic_source: directory or hub name of the fine-tuned model and of the reward model, or of any
            model that the critic is to start from; the latter is None where neither is wanted.
        scale: of the shaped scores; the critic's values are in it.
        optimizer_steps: of the whole run, for the learning-rate schedules.
        of_critic_alone: how many of them, the first, the critic makes alone; the actor's schedule begins after them.
    """
    say_shortened_warmup(config, optimizer_steps - of_critic_alone)
    _say_what_is_shared(config)

    critic_option, critic_name = _named_start(config, actor_source, critic_source)

    def settings_of(stage: int, offload: bool, quantize: str) -> EngineSettings:
        return _settings(config, stage, offload, quantize)

    def load_actor(settings: EngineSettings, trainable: bool) -> nn.Module:
        with named_by("--actor_model_name_or_path", {actor_source: config.actor_model_name_or_path}):
            loading = _loading(config, config.actor, settings, trainable)
            return load_causal_lm(actor_source, codec, **loading)

    def load_critic(settings: EngineSettings, trainable: bool, calibration: Scale) -> ScalarModel:
        source = str(critic_source)
        with named_by(critic_option, {source: critic_name}):
            loading = _loading(config, config.critic, settings, trainable)
            return load_scalar_model(source, codec, calibration=calibration, seed=config.seed, **loading)

    def trained(model: nn.Module, options: TrainedModelOptions, settings: EngineSettings, steps: int) -> Any:
        with named_by("--offload needs", kind=CannotCompile):
            return training_engine(model, settings, OptimizerSettings.for_model(options, config, steps))

    actor_settings = settings_of(config.actor.zero_stage, config.offload, config.actor.quantize)
    actor = load_actor(actor_settings, trainable=True)
    if config.actor.lora_dim:
        with named_by("--actor_lora_module_name"), named_by("--add_eot_token", kind=AddedTokenError):
            base = actor_source if config.merge_adapter else config.actor_model_name_or_path
            _add_adapters(actor, config.actor, base, config.seed)
    critic = None
    critic_settings = settings_of(config.critic.zero_stage, config.offload, config.critic.quantize)
    if config.estimator.needs_critic:
        critic = load_critic(critic_settings, trainable=True, calibration=scale)
        if config.critic.lora_dim:
            critic.keep_reward_head()
            with named_by("--critic_lora_module_name"), named_by("--add_eot_token", kind=AddedTokenError):
                base = str(critic_source) if config.merge_adapter else critic_name
                _add_adapters(critic.classifier, config.critic, base, config.seed)
    actor_engine = trained(actor, config.actor, actor_settings, optimizer_steps - of_critic_alone)
    critic_engine = None if critic is None else trained(critic, config.critic, critic_settings, optimizer_steps)

    reference = None
    if config.has_reference and not config.actor.lora_dim:
        stage = _frozen_stage(config.actor.zero_stage, config.offload_reference_model)
        settings = settings_of(stage, config.offload_reference_model, "none")  # a quantised actor has adapters
        reference = frozen_engine(load_actor(settings, trainable=False), settings)
    reward_model = None
    if _own_reward_model(config):
        stage = _frozen_stage(config.critic.zero_stage, config.offload_reward_model)
        settings = settings_of(stage, config.offload_reward_model, config.reward_quantize)
        reward_model = frozen_engine(load_critic(settings, trainable=False, calibration=RAW), settings)
    ema = EMA(actor_engine.module, config.ema_decay) if config.enable_ema else None
    return PPOModels(actor_engine, critic_engine, reference, reward_model, ema, config.temperature)


def reward_engine(config: PPOConfig, codec: Codec, source: str, name: str) -> Engine:
    """A frozen reward model that reads the actor's ids, one of --reward.

    Args:
        source: directory or hub name.
        name: as the option has it.
    """
    stage = _frozen_stage(config.critic.zero_stage, config.offload_reward_model)
    settings = _settings(config, stage, config.offload_reward_model, config.reward_quantize)
    with named_by("--reward", {source: name}):
        model = load_scalar_model(source, codec, **_loading(config, config.critic, settings, trainable=False))
    return frozen_engine(model, settings)


def _settings(config: PPOConfig, stage: int, offload: bool, quantize: str) -> EngineSettings:
    return EngineSettings(
        stage,
        resolve_dtype(config.dtype),
        config.per_device_training_batch_size,
        offload,
        config.max_grad_norm,
        config.deepspeed_config,
        quantize,
    )


def _loading(
    config: PPOConfig, options: TrainedModelOptions, settings: EngineSettings, trainable: bool
) -> dict[str, Any]:
    """How a model is loaded: the arguments that `load_causal_lm` and `load_scalar_model` share."""
    return {
        "dtype": settings.dtype,
        "dropout": NO_DROPOUT,
        "ds_config": deepspeed_config(settings, trainable),
        "trust_remote_code": config.trust_remote_code,
        "gradient_checkpointing": trainable and options.gradient_checkpointing,
        "quantize": settings.quantize,
    }


def _add_adapters(model: nn.Module, options: TrainedModelOptions, base_name: str, seed: int) -> None:
    add_lora(
        model,
        dim=options.lora_dim,
        alpha=options.lora_alpha,
        dropout=NO_DROPOUT,
        modules=options.lora_module_name,
        base_name=base_name,
        seed=seed,
    )


def _named_start(config: PPOConfig, actor_source: str, critic_source: str | None) -> tuple[str, str]:
    """The option that names what the critic starts from, as messages have it, and the name there."""
    if config.critic_model_name_or_path is not None:
        return "--critic_model_name_or_path", config.critic_model_name_or_path
    if critic_source == actor_source:
        return "the critic's start, --actor_model_name_or_path", config.actor_model_name_or_path
    return "the critic's start, --reward", str(critic_source)


def _say_what_is_shared(config: PPOConfig) -> None:
    if config.has_reference and config.actor.lora_dim and config.offload_reference_model:
        say(
            "note: --offload_reference_model has nothing to move: with --actor_lora_dim the reference is the actor "
            "with its adapters off"
        )
    if config.critic.lora_dim and config.offload_reward_model and not config.scored_otherwise:
        say(
            "note: --offload_reward_model has nothing to move: with --critic_lora_dim the reward model is the critic "
            "with its adapters off"
        )
    if config.reward_quantize != "none" and not config.scored_otherwise and not _own_reward_model(config):
        say(
            f"note: --reward_quantize {config.reward_quantize} has no effect: with --critic_lora_dim the reward model "
            "is the critic with its adapters off, which --critic_quantize decides"
        )


def _own_reward_model(config: PPOConfig) -> bool:
    """Whether the reward model is an engine of its own. A LoRA critic with its adapters off is the reward model, and
    those of --reward are loaded by `reward_engine`."""
    return not config.scored_otherwise and not (config.estimator.needs_critic and config.critic.lora_dim)


def _frozen_stage(trained_stage: int, offload: bool) -> int:
    """A frozen model follows its trained twin; only ZeRO-3 can keep it in CPU memory."""
    return 3 if trained_stage == 3 or offload else 0


@contextlib.contextmanager
def evaluating(models: PPOModels) -> Iterator[None]:
    """Within the context the trained models are in evaluation mode: no gradient checkpointing."""
    for engine in models.trained().values():
        engine.eval()
    try:
        yield
    finally:
        for engine in models.trained().values():
            engine.train()
