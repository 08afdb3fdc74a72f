"""Options that several models have are declared once, and read with their types under any prefix."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from common.config.groups import TrainedModelOptions
from common.config.parser import Config, options, parse
from common.config.shared import prefixed, same_option, unprefixed
from common.errors import UserError
from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_ppo.config import PPOConfig


@dataclass(frozen=True, kw_only=True)
@prefixed("pupil_", TrainedModelOptions, zero_stage={"default": 3, "help": "how the pupil is divided"})
class PupilOptions(Config):
    """Pupil"""

    weight_decay: float = same_option(TrainedModelOptions, "weight_decay", default=0.5)


def test_every_shared_option_has_its_prefix_its_group_and_its_declaration():
    known, shared = options(PupilOptions), options(TrainedModelOptions)
    assert list(known) == [*(f"pupil_{name}" for name in shared), "weight_decay"]
    for name, meta in shared.items():
        own = known[f"pupil_{name}"]
        assert own.group == "Pupil" and own.kind is meta.kind and own.optional == meta.optional
        assert (own.choices, own.low, own.affects, own.deepspeed_keys) == (
            meta.choices,
            meta.low,
            meta.affects,
            meta.deepspeed_keys,
        )
    assert known["pupil_zero_stage"].help == "how the pupil is divided" and known["pupil_zero_stage"].default == 3
    assert "pupil_update" in known["pupil_gradient_checkpointing"].relieves
    with pytest.raises(UserError, match="--pupil_zero_stage: expected one of 0, 1, 2, 3"):
        parse(PupilOptions, ["--pupil_zero_stage", "4"])


def test_the_values_of_a_model_are_read_without_the_prefix():
    config = parse(PupilOptions, ["--pupil_lora_dim", "4", "--weight_decay", "0.25"])
    model = unprefixed(config, TrainedModelOptions, "pupil_")
    assert (model.lora_dim, model.zero_stage, model.weight_decay) == (4, 3, 0.0)


def test_actor_and_critic_have_all_of_them_and_values_of_their_own():
    config = PPOConfig(actor_zero_stage=1, critic_lora_dim=8)
    assert (config.actor.zero_stage, config.critic.zero_stage) == (1, 2)
    assert (config.actor.lora_dim, config.critic.lora_dim) == (0, 8)
    for name in options(TrainedModelOptions):
        assert {f"actor_{name}", f"critic_{name}"} <= set(options(PPOConfig))


@pytest.mark.parametrize("cls", (SFTConfig, RewardConfig))
def test_a_step_with_one_model_has_them_without_a_prefix(cls):
    config = cls(zero_stage=2, learning_rate=0.25)
    assert (config.trained.zero_stage, config.trained.learning_rate) == (2, 0.25)
    assert set(options(TrainedModelOptions)) <= set(options(cls))
