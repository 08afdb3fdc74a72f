"""Saves checkpoints of a run, and publishes its models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.artifacts.export import export_model
from common.artifacts.publish import publishing
from common.checkpoints.manager import TrainingState
from step3_ppo.config import PPOConfig
from step3_ppo.inputs import RunInputs
from step3_ppo.models import PPOModels
from step3_ppo.trainer import PPOTrainer

PARTS = ("actor", "critic", "ema")  # the directories of models that step 3 may write; see `model_parts`


def training_state(trainer: PPOTrainer) -> TrainingState:
    """All state that a resumed run needs to continue exactly."""
    models = trainer.models
    average: dict[str, Any] = (
        {"tensors": models.ema.tensors, "reshape": models.ema.reshape} if models.ema is not None else {}
    )
    return TrainingState(
        models.trained(),
        **average,
        state_dict=trainer.state_dict,
        load_state_dict=trainer.load_state_dict,
        last_step_applied=trainer.learner.step.last_step_applied,
    )


def model_parts(config: PPOConfig) -> list[str]:
    """The directories of the models that this run writes."""
    return [*config.trained_models, *(["ema"] if config.enable_ema else [])]


def save(config: PPOConfig, models: PPOModels, inputs: RunInputs) -> None:
    """actor/ and, where there is one, critic/ and ema/, each a directory that transformers loads."""
    output, codec, scale = Path(config.output_dir), inputs.codec, inputs.scale.current
    with publishing(
        config,
        codec,
        models.trained(),
        step="ppo",
        base=config.actor_model_name_or_path,
        data=inputs.prompts,
        parts=model_parts(config),
        possible_parts=PARTS,
        score_mean=scale.mean,
        score_std=scale.std,
    ):
        for name, engine in models.trained().items():
            export_model(engine, codec, output / name, output / "adapter" / name)
        if models.ema is not None:
            with models.ema.swapped_in():
                export_model(models.actor, codec, output / "ema")
