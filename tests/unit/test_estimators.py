"""Advantage estimators: what the registry and the command line take, and what a run without a critic is made of."""

from dataclasses import replace

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


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "reinforce++_baseline"])
def test_comparing_answers_takes_two_to_a_prompt(name):
    message = refusal("--advantage", name)
    assert f"--advantage {name}" in message and "--answers_per_prompt 2 or more" in message


def test_one_answer_to_a_prompt_is_enough_for_the_others():
    for name in ("gae", "reinforce++"):
        assert parse(PPOConfig, [*MODELS, "--advantage", name]).answers_per_prompt == 1


@pytest.mark.parametrize(
    "words, whitens, aggregation, kl",
    [
        ("", True, "token", "reward"),
        ("--advantage rloo", True, "token", "reward"),
        ("--advantage grpo", False, "sequence", "loss"),
        ("--advantage dr_grpo", False, "constant", "loss"),
        ("--advantage reinforce++", True, "token", "reward"),
        ("--advantage reinforce++_baseline", True, "token", "loss"),
        ("--policy_loss gspo", True, "sequence", "reward"),
        ("--advantage dr_grpo --policy_loss cispo", False, "token", "loss"),
        ("--no_whiten_advantages --loss_aggregation constant --kl_placement loss", False, "constant", "loss"),
        (
            "--advantage grpo --whiten_advantages --policy_loss gspo --loss_aggregation token --kl_placement none",
            True,
            "token",
            "none",
        ),
    ],
)
def test_what_is_not_set_is_as_in_the_papers_of_estimator_and_loss(words, whitens, aggregation, kl):
    config = parse(PPOConfig, [*MODELS, "--answers_per_prompt", "2", *words.split()])
    assert (config.whitens, config.aggregation, config.kl_place) == (whitens, aggregation, kl)
    again = parse(PPOConfig, [*MODELS, "--answers_per_prompt", "2", *config.update_rule.split()])
    assert again.update_rule == config.update_rule


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
        ("--critic_gae_lambda", "1"),
        ("--gae_lambda_alpha", "0.05"),
    ],
)
def test_options_that_an_estimator_does_not_use_are_noted_so_that_a_recipe_serves_any(words, capsys):
    warn(parse(PPOConfig, [*MODELS, *RLOO, *words]))
    assert capsys.readouterr().out == f"note: --advantage rloo does not use {words[0]}: without effect\n"
    warn(parse(PPOConfig, [*MODELS, *words]))
    assert not capsys.readouterr().out


def test_a_start_of_the_critic_is_noted_where_there_is_no_critic_and_no_reward_model(capsys):
    of_functions = ["--actor_model_name_or_path", "./actor", "--reward", "rewards.py:one"]
    warn(parse(PPOConfig, [*of_functions, *RLOO]))
    warn(parse(config_class(own_reward=True), [*of_functions[:2], *RLOO]))
    assert not capsys.readouterr().out
    warn(parse(PPOConfig, [*of_functions, *MODELS[2:], *RLOO]))
    noted = "note: --advantage rloo does not use --critic_model_name_or_path: without effect\n"
    assert capsys.readouterr().out == noted


@pytest.mark.parametrize("low, high, noted", [("0.2", "0.1", True), ("0.2", "0.28", False), ("1", "0.5", False)])
def test_an_upper_side_of_the_clip_below_the_lower_is_noted(low, high, noted, capsys):
    warn(parse(PPOConfig, [*MODELS, "--clip_range", low, "--clip_range_high", high]))
    assert capsys.readouterr().out.startswith("note: --clip_range_high 0.1 is below --clip_range 0.2: ") == noted


def test_options_that_a_loss_or_no_reference_leaves_without_effect_are_noted(capsys):
    config = parse(PPOConfig, [*MODELS, "--policy_loss", "cispo", "--dual_clip", "3", "--kl_placement", "none"])
    warn(replace(config, kl_controller="adaptive", max_kl=3.0, offload_reference_model=True))
    assert capsys.readouterr().out.splitlines() == [
        "note: --policy_loss cispo does not use --dual_clip: without effect",
        "note: --kl_placement none does not use --kl_controller, --max_kl, --offload_reference_model: without effect",
    ]


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
