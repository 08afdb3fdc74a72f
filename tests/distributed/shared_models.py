"""Step 3 with a LoRA critic that is also the reward model, compared with a separate reward model."""

from __future__ import annotations

import torch

from common.artifacts.export import full_state_dict
from common.models.calibration import RAW, Calibration
from common.models.loading import load_scalar_model
from common.models.scalar import score_at_last_token
from common.runtime.distributed import on_every_rank, world_size
from common.training.engine import EngineSettings, deepspeed_config, frozen_engine
from step3_ppo.calibration import ScoreScale
from step3_ppo.config import PPOConfig
from step3_ppo.models import build_models, evaluating, inputs_of
from step3_ppo.reward import TokenRewardModel
from step3_ppo.trainer import PPOTrainer
from tests.distributed.gradient_cases import ROWS, experience
from tests.distributed.variants import DEEPSPEED

UPDATES = 2


def shared_models(model: str, codec, stage: int) -> dict:
    """Whether the scores of a rollout are the reward model's own, and its values, before and after updates."""
    config = PPOConfig(
        dtype="fp32",
        deepspeed_config=DEEPSPEED,
        actor_zero_stage=stage,
        critic_zero_stage=stage,
        actor_lora_dim=4,
        critic_lora_dim=4,
        per_device_training_batch_size=ROWS // world_size() // 2,
        gradient_accumulation_steps=2,
        critic_learning_rate=0.1,
        critic_lora_learning_rate=0.1,
        num_warmup_steps=0,
        lr_scheduler_type="constant",
    )
    models = build_models(config, codec, model, model, Calibration(2.0, 3.0), UPDATES)
    settings = EngineSettings(3 if stage == 3 else 0, torch.float32, ROWS, override=DEEPSPEED)
    own = frozen_engine(
        load_scalar_model(
            model,
            codec,
            dtype=torch.float32,
            dropout=0.0,
            seed=config.seed,
            ds_config=deepspeed_config(settings, trainable=False),
        ),
        settings,
    )
    trainer = PPOTrainer(models, TokenRewardModel(models, config), config, codec, None, None, ScoreScale(RAW))
    rollout = experience().rollout
    with torch.no_grad():
        expected = score_at_last_token(own(**inputs_of(rollout)), rollout.lengths)
    found = []
    for update in range(UPDATES + 1):
        with evaluating(models):
            found.append(
                {
                    "equal": on_every_rank(torch.equal(models.scores(rollout), expected)),
                    "values": models.values(rollout).flatten().tolist(),
                }
            )
        if update < UPDATES:
            trainer.update(experience(), update)
    names = sorted(full_state_dict(models.critic) or [])
    own.destroy()
    models.destroy()
    return {
        "scores": expected.tolist(),
        "found": found,
        "names": names,
        "shared": models.reward_model is None and models.reference is None,
    }
