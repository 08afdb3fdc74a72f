"""The scale of PPO's scores: from the reward model's provenance, from the first rollout, or none."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from common.artifacts.compatibility import text_of
from common.artifacts.export import write_model
from common.artifacts.provenance import Provenance
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError
from common.models.builtin import materialise
from common.models.calibration import RAW, Calibration
from common.models.loading import load_causal_lm, load_scalar_model
from step3_ppo.calibration import ScoreScale, read_calibration
from step3_ppo.config import PPOConfig, config_class
from step3_ppo.generation.rollout import Rollout
from step3_ppo.models import PPOModels
from step3_ppo.reward import TokenRewardModel
from step3_ppo.scoring import ModelOutputs, to_scale
from step3_ppo.trainer import PPOTrainer
from tests.architectures import build_model

SCORES = torch.tensor([210.0, 190.0, 230.0, 170.0])  # raw, all would be clipped at 5


class UnshardedEngine:
    """An engine as it is on one rank at ZeRO 0, without a process group."""

    def __init__(self, module):
        self.module = module


@pytest.fixture(scope="module")
def base(tmp_path_factory, builtin_cache):
    return build_model("opt", tmp_path_factory.mktemp("base"), builtin_cache)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, base):
    """A reward model that says nothing of its scores, with its codec."""
    codec = make_codec(load_tokenizer(str(base)), "human_assistant")
    model = load_scalar_model(str(base), codec, dtype=torch.float32, seed=7)
    directory = tmp_path_factory.mktemp("reward_model")
    write_model(model, dict(model.state_dict()), codec, directory)
    return directory, codec


def config(**options) -> PPOConfig:
    return PPOConfig(actor_model_name_or_path="./actor", **options)


@pytest.fixture
def calibrated(reward_model, tmp_path):
    """The same reward model with its provenance, as step 2 writes it."""
    directory, codec = reward_model
    shutil.copytree(directory, tmp_path / "reward_model")
    Provenance(
        step="reward", base="x", data_split="2,4,4", eval_fraction=0.05, score_mean=0.5, score_std=2.0, **text_of(codec)
    ).write(tmp_path / "reward_model")
    return tmp_path / "reward_model", codec


@pytest.mark.parametrize(
    "options, expected, said",
    [
        ({}, Calibration(0.5, 2.0), "own mean 0.5 and spread 2"),
        ({"score_calibration": "provenance"}, Calibration(0.5, 2.0), "own mean 0.5 and spread 2"),
        ({"score_calibration": "rollout"}, None, "first rollouts"),
        ({"score_calibration": "none"}, RAW, "as they are, clipped to plus or minus 5 (--score_clip)"),
        ({"normalize_scores": False}, RAW, "as they are"),
    ],
)
def test_a_reward_model_with_its_scale_is_measured_in_it_unless_told_otherwise(
    calibrated, options, expected, said, capsys
):
    directory, codec = calibrated
    assert read_calibration(config(**options), codec, str(directory)) == expected
    (line,) = capsys.readouterr().out.splitlines()
    assert said in line


@pytest.mark.parametrize("options, expected", [({}, None), ({"score_calibration": "none"}, RAW)])
def test_scores_of_an_unknown_scale_are_used_raw_by_name_only(reward_model, options, expected):
    directory, codec = reward_model
    assert read_calibration(config(**options), codec, str(directory)) == expected


def test_a_scale_that_is_not_there_is_refused_with_what_to_write(reward_model):
    directory, codec = reward_model
    with pytest.raises(UserError, match="--score_calibration rollout"):
        read_calibration(config(score_calibration="provenance"), codec, str(directory))


@pytest.mark.parametrize(
    "mean, std",
    [("0.5", 2.0), (0.5, "wide"), (None, 2.0), (True, 2.0), (0.5, 1e-300), (1e300, 2.0), (1e9, 1.0), (0.5, -1.0)],
)
def test_an_unusable_scale_is_refused_before_models_are_loaded(calibrated, mean, std):
    directory, codec = calibrated
    written = json.loads((directory / "provenance.json").read_text())
    (directory / "provenance.json").write_text(json.dumps({**written, "score_mean": mean, "score_std": std}))
    with pytest.raises(UserError, match="provenance.json is damaged|nothing can be measured in") as error:
        read_calibration(config(critic_model_name_or_path=str(directory)), codec, str(directory))
    assert str(directory) in str(error.value)


def other_chat(codec, template="human_assistant"):
    """The codec of an actor with the same tokens and another chat template."""
    tokenizer = load_tokenizer(codec.tokenizer.name_or_path)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return make_codec(tokenizer, template)


@pytest.mark.parametrize("template, said", [("human_assistant", ""), ("chat", "another chat template")])
def test_another_chat_template_is_accepted_if_the_ids_are_the_same(reward_model, template, said, capsys):
    directory, codec = reward_model
    assert read_calibration(config(template=template), other_chat(codec, template), str(directory)) is None
    assert said in capsys.readouterr().out


def test_another_chat_template_is_accepted_for_a_reward_model_trained_without_it(calibrated):
    directory, codec = calibrated
    assert read_calibration(config(), other_chat(codec), str(directory)) == Calibration(0.5, 2.0)


def test_a_reward_model_trained_on_another_chat_templates_text_is_refused_with_the_reason(calibrated):
    directory, codec = calibrated
    theirs = other_chat(codec, "chat")
    theirs.tokenizer.save_pretrained(directory)
    written = json.loads((directory / "provenance.json").read_text())
    (directory / "provenance.json").write_text(json.dumps({**written, **text_of(theirs)}))
    ours = other_chat(codec)
    ours.tokenizer.chat_template = ours.tokenizer.chat_template.replace(": ", " says: ")
    with pytest.raises(UserError, match="another chat template"):
        read_calibration(config(template="chat"), make_codec(ours.tokenizer, "chat"), str(directory))


def test_other_ids_are_refused(reward_model, builtin_cache):
    directory, codec = reward_model
    other = make_codec(load_tokenizer(str(materialise("builtin:tiny-llama", builtin_cache))), "human_assistant")
    with pytest.raises(UserError, match="another tokenizer than the actor"):
        read_calibration(config(), other, str(directory))


def test_scores_of_ones_own_need_no_reward_model_but_the_actors_tokens_and_data(
    base, calibrated, builtin_cache, capsys
):
    """The critic may then start from a language model; a scale that a reward model has is not that of the scores."""
    scorer, codec = calibrated
    own = lambda **options: config_class(own_reward=True)(actor_model_name_or_path="./actor", **options)
    with pytest.raises(UserError, match="./model is no reward model"):
        read_calibration(config(critic_model_name_or_path="./model"), codec, str(base))
    assert read_calibration(own(critic_model_name_or_path="./model"), codec, str(base)) is None
    assert "critic starts from the language model ./model, with a new score head\n" in capsys.readouterr().out
    assert read_calibration(own(), codec, str(scorer)) is None
    assert read_calibration(own(score_calibration="none"), codec, str(base)) == RAW
    assert read_calibration(own(), codec, None) is None
    other = make_codec(load_tokenizer(str(materialise("builtin:tiny-llama", builtin_cache))), "human_assistant")
    with pytest.raises(UserError, match="another tokenizer than the actor"):
        read_calibration(own(), other, str(base))
    with pytest.raises(UserError, match="use the same in every step"):
        read_calibration(own(), make_codec(codec.tokenizer, "question_answer"), str(scorer))


@pytest.mark.parametrize("values, measured", [(torch.zeros(4, 2), "scores and values"), (None, "scores")])
def test_the_line_on_the_scale_speaks_of_values_only_with_a_critic(values, measured, capsys):
    outputs = replace(assessed(SCORES)[1], values=values)
    to_scale(outputs, ScoreScale(None))
    assert f"from here on {measured} are measured in these" in capsys.readouterr().out


@pytest.fixture
def trainer(reward_model, base) -> PPOTrainer:
    """One that is to take the scale from its first rollout."""
    directory, codec = reward_model
    actor = load_causal_lm(str(base), codec, dtype=torch.float32)
    scale = ScoreScale(None)
    critic = load_scalar_model(str(directory), codec, dtype=torch.float32, calibration=scale)
    models = PPOModels(UnshardedEngine(actor), UnshardedEngine(critic), None, None, None, 1.0)
    options = config(missing_eos_penalty=0.0)
    return PPOTrainer(models, TokenRewardModel(models, options), options, codec, None, None, scale)


def assessed(scores) -> tuple[Rollout, ModelOutputs]:
    rows = len(scores)
    rollout = Rollout(
        torch.ones(rows, 5, dtype=torch.long),
        torch.full((rows,), 3),
        torch.full((rows,), 2),
        torch.ones(rows, dtype=torch.bool),
        torch.arange(rows),
        torch.ones(rows, dtype=torch.bool),
        torch.zeros(rows, dtype=torch.long),
    )
    return rollout, ModelOutputs(*torch.zeros(3, rows, 2), torch.full((rows, 2), 200.0), scores)


def test_large_scores_are_brought_to_their_own_mean_and_spread(trainer):
    rollout, outputs = assessed(SCORES)
    assert trainer.rewards(rollout, outputs)[0].scores.tolist() == [5.0] * 4  # nothing to learn from
    outputs = to_scale(outputs, trainer.scale)
    shaped, rewards = trainer.rewards(rollout, outputs)
    expected = (SCORES - SCORES.mean()) / SCORES.std(correction=0)
    torch.testing.assert_close(shaped.scores, expected)
    torch.testing.assert_close(rewards[:, -1], expected)
    assert not shaped.sums["clipped"]
    torch.testing.assert_close(outputs.values, torch.zeros(4, 2))  # the critic's values, in the same scale


def test_the_evaluation_before_the_first_iteration_counts_too(trainer):
    trainer.scale.observe(SCORES[:3])
    to_scale(assessed(SCORES[3:])[1], trainer.scale)
    assert trainer.scale.calibration == Calibration.of(SCORES)


def test_the_critic_goes_on_in_the_scale_that_was_measured(trainer):
    inputs = {"input_ids": torch.arange(10, 18)[None]}
    with torch.no_grad():
        raw = trainer.models.critic.module.eval()(**inputs)
        to_scale(assessed(SCORES)[1], trainer.scale)
        torch.testing.assert_close(
            trainer.models.critic.module(**inputs), (raw - SCORES.mean()) / SCORES.std(correction=0)
        )


def test_a_resumed_run_has_the_very_scale(trainer, reward_model):
    to_scale(assessed(SCORES + 1 / 3)[1], trainer.scale)
    state = json.loads(json.dumps(trainer.state_dict()))
    scale = ScoreScale(None)
    critic = load_scalar_model(str(reward_model[0]), trainer.codec, dtype=torch.float32, calibration=scale)
    models = replace(trainer.models, critic=UnshardedEngine(critic))
    other = PPOTrainer(models, trainer.reward, trainer.config, trainer.codec, None, None, scale)
    other.load_state_dict(state)
    assert other.scale.calibration == trainer.scale.calibration
    raw = torch.tensor([1.0, 200.0])
    assert torch.equal(critic.calibration.normalise(raw), trainer.models.critic.module.calibration.normalise(raw))
    assert not torch.equal(critic.calibration.normalise(raw), raw)


@pytest.mark.parametrize("scores", [torch.full((4,), 3.0), torch.tensor([3.0])])
def test_scores_that_do_not_vary_give_no_scale(trainer, scores):
    with pytest.raises(UserError, match="--score_calibration none"):
        to_scale(assessed(scores)[1], trainer.scale)
