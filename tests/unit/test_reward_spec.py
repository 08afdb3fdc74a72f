"""What --reward may name, and what each wrong spelling is told."""

import pytest

from common.config.parser import parse
from common.errors import UserError
from common.rewards.errors import RewardError
from common.rewards.spec import RewardSpec, parse_rewards
from inference.evaluate import EvaluateConfig
from step3_ppo.config import PPOConfig, config_class

MODELS = ["--actor_model_name_or_path", "./actor", "--critic_model_name_or_path", "./critic"]


@pytest.mark.parametrize(
    "word, kind, name, weight, label",
    [
        ("my_reward.py:correct", "function", "my_reward.py:correct", 1.0, "correct"),
        ("~/rewards/my.py:correct=0.5", "function", "~/rewards/my.py:correct", 0.5, "correct"),
        ("package.module:score=-2", "function", "package.module:score", -2.0, "score"),
        ("http://localhost:8000/score", "service", "http://localhost:8000/score", 1.0, "localhost"),
        ("https://host/score=1e-1", "service", "https://host/score", 0.1, "host"),
        ("https://host/score?model=large", "service", "https://host/score?model=large", 1.0, "host"),
        ("output/reward", "model", "output/reward", 1.0, "reward"),
        ("owner/name-v3=2", "model", "owner/name-v3", 2.0, "name-v3"),
        ("builtin:reward", "model", "builtin:reward", 1.0, "builtin:reward"),
    ],
)
def test_the_kind_of_a_reward_follows_from_its_spelling(word, kind, name, weight, label):
    (spec,) = parse_rewards([word])
    assert spec == RewardSpec(name, weight, label) and spec.kind == kind


def test_every_reward_has_a_label_of_its_own():
    assert [spec.label for spec in parse_rewards(["a.py:score", "b.py:score", "c/score"])] == [
        "score",
        "score-2",
        "score-3",
    ]
    labels = [spec.label for spec in parse_rewards(["a/judge-2", "b/judge", "c/judge"])]
    assert labels == ["judge-2", "judge", "judge-3"]


def test_no_reward_is_logged_by_the_name_of_anothers_spread():
    for words in (["a.py:x", "a.py:x_std"], ["a.py:x_std", "a.py:x"], ["a.py:x_failed", "a.py:x", "a.py:x_clipped"]):
        labels = [spec.label for spec in parse_rewards(words)]
        metrics = [label + ending for label in labels for ending in ("", "_std", "_clipped", "_failed")]
        assert len(set(metrics)) == len(metrics), labels


@pytest.mark.parametrize(
    "words, said",
    [
        (["my.py:correct=much"], "is to be a finite number other than 0, not 'much'"),
        (["my.py:correct=1e400"], "is to be a finite number other than 0, not '1e400'"),
        (["my.py:correct="], "not ''"),
        (["my.py:correct=0"], "not '0'"),
        (["my.py:correct=nan"], "not 'nan'"),
        (["=2"], "there is no name before ="),
        (["my.py:correct", "my.py:correct=2"], "my.py:correct: is named twice"),
        (["my_reward.py"], "name the function in it too"),
        (["http://"], "is no address"),
    ],
)
def test_what_means_nothing_is_one_line(words, said):
    with pytest.raises(RewardError) as error:
        parse_rewards(words)
    assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="^--reward "):
        parse(PPOConfig, [*MODELS, "--reward", *words])


@pytest.mark.parametrize(
    "url", ["http://user:hidden@host/score", "https://hidden@host/score=2", "http://a:hidden@h/=x"]
)
def test_a_password_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(UserError) as error:
        parse(PPOConfig, [*MODELS, "--reward", url])
    assert "hidden" not in str(error.value) and "***@" in str(error.value)


def test_a_query_in_an_address_gets_a_warning_that_does_not_repeat_it():
    words = ["--reward", "https://host/score?key=hidden", "http://other/", "a.py:f"]
    (warning,) = parse(PPOConfig, [*MODELS, *words]).reward_warnings()
    assert warning.startswith("--reward https://host/score?...: the address is saved and printed as it is")
    assert "--reward_header_env" in warning and "hidden" not in warning


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--reward_workers 2", "--reward_workers works only with a function in --reward"),
        ("--reward http://host/ --reward_workers 2", "--reward_workers works only with a function in --reward"),
        ("--reward a.py:f --reward_retries 1", "--reward_retries works only with a service in --reward"),
        ("--reward a.py:f --reward_header_env TOKEN", "--reward_header_env works only with a service"),
        ("--reward a.py:f --reward_timeout 5", "--reward_timeout works only with"),
        ("--reward a.py:f --reward_max_seq_len 50", "--reward_max_seq_len works only with a reward model"),
        ("--reward a.py:f --reward_batch_size 5", "--reward_batch_size works only with"),
        ("--reward ./model --reward_errors zero", "--reward_errors works only with a function or a service"),
        ("--keep_columns answer", "--keep_columns works only with --reward"),
        ("--reward a.py:f --offload_reward_model", "--offload_reward_model works only with"),
        ("--no_normalize_scores --score_calibration running", "contradict each other"),
    ],
)
def test_options_without_the_reward_that_they_are_for_are_refused(flags, said):
    with pytest.raises(UserError) as error:
        parse(PPOConfig, [*MODELS, *flags.split()])
    assert said in str(error.value)


def test_the_critic_starts_from_the_reward_model_of_step_2_unless_a_reward_is_named():
    assert PPOConfig().critic_model_name_or_path == "output/reward"
    assert PPOConfig(reward=("a.py:f",)).critic_model_name_or_path is None
    config = parse(PPOConfig, ["--actor_model_name_or_path", "./actor", "--reward", "a.py:f"])
    assert config.scored_otherwise and config.reads_reward_model
    assert not parse(PPOConfig, MODELS).scored_otherwise


def test_a_reward_of_the_programs_own_leaves_no_room_for_others():
    with pytest.raises(UserError, match="--reward: this program brings a reward of its own"):
        parse(config_class(own_reward=True), [*MODELS, "--reward", "a.py:f"])
    assert parse(config_class(own_reward=True), [*MODELS, "--keep_columns", "answer"]).keep_columns == ("answer",)


def test_an_evaluation_takes_one_reward_model_or_rewards():
    data = ["--data_path", "builtin:courtesy"]
    assert parse(EvaluateConfig, [*data, "--reward", "a.py:f", "./model=2"]).reward_specs()[1].weight == 2
    with pytest.raises(UserError, match="--reward_model_path .*model and --reward a.py:f contradict each other: keep"):
        parse(EvaluateConfig, [*data, "--reward", "a.py:f", "--reward_model_path", "./model"])
