"""What the models of step 3 are at its start: the critic the normalised reward model, all of them without dropout, and
log-probs at the temperature of sampling."""

from dataclasses import replace

import pytest
import torch

from common.artifacts.export import write_model
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import ModelError, UserError
from common.models.calibration import RAW, Calibration
from common.models.loading import load_causal_lm, load_scalar_model
from step3_ppo import models as ppo_models
from step3_ppo.config import PPOConfig
from step3_ppo.generation.rollout import Rollout
from step3_ppo.models import PPOModels, build_models
from tests.architectures import build_model

TEMPERATURE, MEAN, STD = 0.7, 0.5, 4.0
PROMPTS, RESPONSES = torch.tensor([3, 6]), torch.tensor([5, 2])


class UnshardedEngine:
    """Stands for an engine on one rank at ZeRO 0; needs no process group."""

    def __init__(self, module, *settings):
        self.module = module

    def __call__(self, *arguments, **inputs):
        return self.module(*arguments, **inputs)


@pytest.fixture(scope="module")
def directories(tmp_path_factory, builtin_cache):
    """A language model and a reward model of it, both with dropout."""
    actor = build_model("opt", tmp_path_factory.mktemp("actor"), builtin_cache, dropout=0.5, attention_dropout=0.5)
    codec = make_codec(load_tokenizer(str(actor)), "human_assistant")
    reward_model = load_scalar_model(str(actor), codec, dtype=torch.float32, seed=7)
    reward = tmp_path_factory.mktemp("reward")
    write_model(reward_model, dict(reward_model.state_dict()), codec, reward)
    return str(actor), str(reward), codec


@pytest.fixture(params=["full", "lora"])
def models(request, directories, monkeypatch):
    actor, reward, codec = directories
    for name in ("training_engine", "frozen_engine"):
        monkeypatch.setattr(ppo_models, name, UnshardedEngine)
    lora = {"actor_lora_dim": 2, "critic_lora_dim": 2} if request.param == "lora" else {}
    config = PPOConfig(temperature=TEMPERATURE, dtype="fp32", actor_zero_stage=0, critic_zero_stage=0, **lora)
    return build_models(config, codec, actor, reward, Calibration(MEAN, STD), optimizer_steps=10)


@pytest.mark.parametrize("merge_adapter", [False, True])
def test_an_adapter_names_its_base_as_the_user_did_unless_that_was_merged(directories, monkeypatch, merge_adapter):
    actor, reward, codec = directories
    monkeypatch.setattr(ppo_models, "training_engine", UnshardedEngine)
    config = PPOConfig(
        actor_model_name_or_path="builtin:actor",
        critic_model_name_or_path="builtin:reward",
        merge_adapter=merge_adapter,
        dtype="fp32",
        actor_zero_stage=0,
        critic_zero_stage=0,
        actor_lora_dim=2,
        critic_lora_dim=2,
    )
    models = build_models(config, codec, actor, reward, Calibration(MEAN, STD), optimizer_steps=10)
    adapted = models.actor.module, models.critic.module.classifier
    found = [model.lora_config.base_model_name_or_path for model in adapted]
    assert found == ([actor, reward] if merge_adapter else ["builtin:actor", "builtin:reward"])
    from_actor = replace(config, critic_model_name_or_path=None, reward=("rewards.py:one",))
    models = build_models(from_actor, codec, actor, actor, RAW, optimizer_steps=10)
    assert models.critic.module.classifier.lora_config.base_model_name_or_path == found[0]


@pytest.mark.parametrize(
    "source, flag", [("actor", "--actor_model_name_or_path builtin:actor"), ("other", "--reward other")]
)
def test_a_critic_that_cannot_start_is_named_by_the_option_that_led_there(directories, monkeypatch, source, flag):
    actor, _, codec = directories

    def refuse(source, *_, **settings):
        raise ModelError(source, "it has no score")

    monkeypatch.setattr(ppo_models, "load_scalar_model", refuse)
    config = PPOConfig(
        actor_model_name_or_path="builtin:actor", reward=("rewards.py:one",), dtype="fp32", actor_zero_stage=0
    )
    with pytest.raises(UserError) as error:
        build_models(config, codec, actor, actor if source == "actor" else source, Calibration(MEAN, STD), 10)
    assert str(error.value) == f"the critic's start, {flag}: it has no score"


def test_each_engine_has_its_own_epsilon_and_the_actor_a_schedule_after_the_critics_warm_up(directories, monkeypatch):
    actor, reward, codec = directories
    built = []
    monkeypatch.setattr(ppo_models, "training_engine", lambda model, _, optimizer: built.append(optimizer))
    monkeypatch.setattr(ppo_models, "frozen_engine", UnshardedEngine)
    config = PPOConfig(
        dtype="fp32", actor_zero_stage=0, critic_zero_stage=0, actor_adam_epsilon=1e-5, critic_adam_epsilon=1e-6
    )
    build_models(config, codec, actor, reward, Calibration(MEAN, STD), optimizer_steps=10, of_critic_alone=4)
    assert [(settings.epsilon, settings.total_steps) for settings in built] == [(1e-5, 6), (1e-6, 10)]


def test_without_a_critic_there_are_no_values(rollout):
    with pytest.raises(ValueError, match="none is loaded"):
        PPOModels(None, None, None, None, None, 1.0).values(rollout)


@pytest.fixture
def rollout():
    tokens = torch.randint(10, 300, (2, 8), generator=torch.Generator().manual_seed(1))
    return Rollout(
        tokens,
        PROMPTS,
        RESPONSES,
        torch.zeros(2, dtype=torch.bool),
        torch.arange(2),
        torch.ones(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.long),
    )


def test_the_critic_starts_as_the_normalised_reward_model(models, rollout):
    """A value is read one token before its token: that of a response's next token at the token that is scored."""
    longer = Rollout(
        torch.nn.functional.pad(rollout.tokens, (0, 1), value=5),
        PROMPTS,
        RESPONSES + 1,
        rollout.finished,
        rollout.prompt_index,
        rollout.real,
        rollout.made_by,
    )
    values = models.values(longer)[torch.arange(2), RESPONSES]
    torch.testing.assert_close(values, (models.scores(rollout) - MEAN) / STD)


def test_dropout_is_off_in_all_models_even_in_training_mode(models, rollout):
    for engine in (models.actor, models.critic):
        engine.module.train()
    for numbers in (
        lambda: models.values(rollout),
        lambda: models.log_probs_and_entropy(rollout)[0],
        lambda: models.scores(rollout),
        lambda: models.reference_log_probs(rollout),
    ):
        torch.testing.assert_close(numbers(), numbers(), atol=0, rtol=0)


@torch.no_grad()
def test_log_probs_are_those_of_the_policy_that_is_sampled_from(models, rollout, directories):
    actor, _, codec = directories
    plain = load_causal_lm(actor, codec, dtype=torch.float32, dropout=0.0).eval()
    logits = plain(input_ids=rollout.tokens, attention_mask=rollout.attention_mask).logits
    for found in (models.log_probs_and_entropy(rollout)[0], models.reference_log_probs(rollout)):
        for row, (prompt, response) in enumerate(zip(PROMPTS.tolist(), RESPONSES.tolist())):
            for token in range(response):
                at = prompt + token
                expected = (logits[row, at - 1] / TEMPERATURE).log_softmax(-1)[rollout.tokens[row, at]]
                torch.testing.assert_close(found[row, token], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [0, 2])
def test_where_the_kl_is_measured_nowhere_no_reference_is_loaded(directories, monkeypatch, lora, capsys):
    actor, reward, codec = directories
    frozen = []
    monkeypatch.setattr(ppo_models, "training_engine", UnshardedEngine)
    monkeypatch.setattr(ppo_models, "frozen_engine", lambda module, *_: frozen.append(module))
    config = PPOConfig(kl_placement="none", dtype="fp32", actor_zero_stage=0, critic_zero_stage=0, actor_lora_dim=lora)
    models = build_models(config, codec, actor, reward, Calibration(MEAN, STD), optimizer_steps=10)
    assert models.reference is None and len(frozen) == 1  # the reward model


def test_without_a_critic_the_reward_model_is_an_engine_of_its_own(directories, monkeypatch, rollout):
    actor, reward, codec = directories
    for name in ("training_engine", "frozen_engine"):
        monkeypatch.setattr(ppo_models, name, UnshardedEngine)
    config = PPOConfig(advantage="rloo", answers_per_prompt=2, dtype="fp32", actor_zero_stage=0, actor_lora_dim=2)
    models = build_models(config, codec, actor, reward, Calibration(MEAN, STD), optimizer_steps=10)
    assert models.critic is None and list(models.trained()) == ["actor"]
    plain = load_scalar_model(reward, codec, dtype=torch.float32, dropout=0.0).eval()
    with torch.no_grad():
        numbers = plain(rollout.tokens)
    expected = numbers[torch.arange(2), rollout.lengths - 1]
    torch.testing.assert_close(models.scores(rollout), expected, rtol=0, atol=1e-6)
