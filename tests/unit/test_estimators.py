"""Advantage estimators: what the registry and the command line take, and what a run without a critic is made of."""

import pytest

from common.config.parser import parse
from common.errors import UserError
from step3_ppo.advantages import ESTIMATORS, Estimator, register
from step3_ppo.config import PPOConfig, config_class
from step3_ppo.inputs import warn
from step3_ppo.saving import model_parts

MODELS = ["--actor_model_name_or_path", "./actor", "--critic_model_name_or_path", "./reward"]
RLOO = ["--advantage", "rloo", "--answers_per_prompt", "2"]


@pytest.fixture
def own(monkeypatch) -> Estimator:
    """An estimator of a user's own; the registry is as before after the test."""
    monkeypatch.setattr("step3_ppo.advantages.ESTIMATORS", known := dict(ESTIMATORS))
    for reader in ("config", "loss_options"):
        monkeypatch.setattr(f"step3_ppo.{reader}.ESTIMATORS", known)
    return Estimator("own", lambda rewards, *_: (rewards, None), needs_critic=False)


def refusal(*words: str, config=PPOConfig) -> str:
    with pytest.raises(UserError) as error:
        parse(config, [*MODELS, *words])
    return str(error.value)


def test_an_unknown_name_is_refused_with_those_that_there_are():
    message = refusal("--advantage", "rlo")
    assert "--advantage" in message and "'rlo'" in message and all(name in message for name in ESTIMATORS)


def test_comparing_answers_takes_two_to_a_prompt():
    message = refusal("--advantage", "rloo")
    assert "--advantage rloo" in message and "--answers_per_prompt 2 or more" in message


@pytest.mark.parametrize(
    "words",
    [
        ("--critic_learning_rate", "1e-3"),
        ("--critic_weight_decay", "0"),
        ("--critic_lora_dim", "4"),
        ("--critic_gradient_checkpointing",),
        ("--value_clip_range", "0.5"),
        ("--gae_lambda", "0.5"),
        ("--gamma", "0.5"),
    ],
)
def test_options_that_an_estimator_does_not_use_are_noted_so_that_a_recipe_serves_any(words, capsys):
    warn(parse(PPOConfig, [*MODELS, *RLOO, *words]))
    assert capsys.readouterr().out == f"note: --advantage rloo does not use {words[0]}: without effect\n"
    warn(parse(PPOConfig, [*MODELS, *words]))
    assert not capsys.readouterr().out


def test_without_a_critic_there_is_no_directory_for_it():
    assert model_parts(parse(PPOConfig, MODELS)) == ["actor", "critic"]
    assert model_parts(parse(PPOConfig, [*MODELS, *RLOO, "--enable_ema"])) == ["actor", "ema"]


def test_an_estimator_of_ones_own_is_the_default_beside_the_others(own):
    config = config_class(own)
    assert parse(config, MODELS).estimator is own
    assert parse(config, [*MODELS, *RLOO]).estimator is ESTIMATORS["rloo"]
    assert "own" in refusal("--advantage", "none", config=config)
    assert refusal("--advantage", "own").startswith("--advantage")  # a program without it does not know it


def test_two_estimators_of_one_name_are_refused(own):
    assert register(own) is register(own)
    with pytest.raises(ValueError, match="named own"):
        register(Estimator("own", own.estimate, needs_critic=True))


def test_with_a_reward_of_ones_own_a_reward_model_is_needed_for_the_critic_alone():
    config, actor = config_class(own_reward=True), MODELS[:2]
    assert not parse(config, [*actor, *RLOO]).reads_reward_model
    assert parse(config, MODELS).reads_reward_model
    with pytest.raises(UserError, match="step2_reward/main.py"):
        parse(config, actor)
    with pytest.raises(UserError, match="score_calibration provenance"):
        parse(config, [*actor, *RLOO, "--score_calibration", "provenance"])
