"""Rewards that cannot be used are refused in one line that names --reward, before any model is loaded."""

import json
import re
import shlex
import shutil

import pytest
import torch
import transformers as hf

from common.artifacts.compatibility import text_of
from common.artifacts.provenance import Provenance
from common.config.parser import parse
from common.data.tokenization import load_tokenizer, make_codec
from common.models.builtin import materialise
from common.models.calibration import RAW, Calibration
from common.rewards.batch import trial_batch
from step3_ppo import models
from step3_ppo.config import PPOConfig
from step3_ppo.inputs import read_inputs
from step3_ppo.main import main as step3
from tests.architectures import build_model
from tests.launching import ROOT
from tests.refusals import refusal
from tests.rewards import Server

FUNCTIONS = """
def good(responses, answer): return [0.0] * len(responses)
def missing(responses, anwser): return [0.0] * len(responses)
def none(responses): return [None] * len(responses)
def short(responses): return [0.0]
def raising(responses): raise ValueError("no such luck")
def hanging(responses):
    import time
    time.sleep(3600)
"""


@pytest.fixture
def good(tmp_path, builtin_cache, monkeypatch):
    """Arguments of step 3 that would work with a good reward."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(FUNCTIONS)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"What is {n} plus {n}?", "answer": str(2 * n)}) + "\n" for n in range(40))
    )

    def forbidden(*_, **__):
        raise AssertionError("a model is loaded")

    for name in ("load_causal_lm", "load_scalar_model"):
        monkeypatch.setattr(models, name, forbidden)
    return {
        "--actor_model_name_or_path": str(materialise("builtin:tiny-opt", builtin_cache)),
        "--data_path": "rows.jsonl",
        "--data_split": "0,0,1",
        "--max_prompt_seq_len": "32",
        "--max_answer_seq_len": "8",
        "--output_dir": "out",
        "--data_output_path": "data",
    }


@pytest.mark.parametrize(
    "reward, said",
    [
        ("nowhere.py:good", ["nowhere.py:good: there is no file nowhere.py"]),
        ("no_module_here:good", ["there is no module no_module_here"]),
        ("my.py:god", ["has no function god; did you mean good?"]),
        (
            "my.py:missing",
            ["my.py:missing: its parameter anwser is a column", "did you mean answer?; it has answer, prompt"],
        ),
        ("my.py:none", ["response 1 of 2, to the prompt in", "rows.jsonl:", "it gave None"]),
        ("my.py:short", ["it gave 1 scores for 2 responses"]),
        ("my.py:raising", ["response 1 of 2", "it raised ValueError: no such luck (my.py, line 6)"]),
        ("./nothing/here", ["./nothing/here: no such model directory"]),
        ("builtin:tiny-opt", ["builtin:tiny-opt: it is no reward model"]),
    ],
)
def test_a_reward_that_cannot_be_used_is_one_line(good, reward, said):
    message = refusal(step3, {**good, "--reward": reward})
    assert message.startswith("--reward ")
    for part in said:
        assert part in message


def test_a_function_that_hangs_is_one_line(good):
    message = refusal(step3, {**good, "--reward": "my.py:hanging", "--reward_workers": "1", "--reward_timeout": "2"})
    assert message.startswith("--reward my.py:hanging: ") and "no answer within 2 seconds (--reward_timeout)" in message


def test_a_service_that_refuses_is_one_line(good):
    server = Server((403, "who are you?"))
    message = refusal(step3, {**good, "--reward": f"{server.url}=0.5"})
    server.shutdown()
    server.server_close()
    assert message.startswith(f"--reward {server.url}: ") and "it answered 403 Forbidden: 'who are you?'" in message
    message = refusal(step3, {**good, "--reward": server.url, "--reward_header_env": "NO_SUCH_TOKEN"})
    assert message.startswith("--reward_header_env NO_SUCH_TOKEN: the environment variable is not set")


def test_a_column_that_is_named_and_missing_is_one_line(good):
    message = refusal(step3, {**good, "--reward": "my.py:good", "--keep_columns": "level"})
    assert message.startswith("--keep_columns level: ") and "it has answer, prompt" in message


def test_the_scale_of_a_function_is_not_in_a_provenance(good):
    message = refusal(step3, {**good, "--reward": "my.py:good", "--score_calibration": "provenance"})
    assert message.startswith("--reward my.py:good has no provenance.json")


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory, builtin_cache):
    """Reward models on the tokens of an actor and on others, each with the scale of its scores."""
    place = tmp_path_factory.mktemp("models")
    build_model("opt", place / "actor", builtin_cache)
    build_model("llama", place / "llama", builtin_cache)
    other = hf.AutoTokenizer.from_pretrained(materialise("builtin:tiny-llama", builtin_cache))
    for name, base, tokenizer in (("same", "actor", None), ("other", "llama", other)):
        model = hf.AutoModelForSequenceClassification.from_pretrained(place / base, num_labels=1)
        if tokenizer is not None:
            model.resize_token_embeddings(len(tokenizer))
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(place / name)
        (tokenizer or hf.AutoTokenizer.from_pretrained(place / base)).save_pretrained(place / name)
        codec = make_codec(load_tokenizer(str(place / name)), "human_assistant")
        Provenance(
            *("reward", "x"), data_split="0,0,1", eval_fraction=0.05, score_mean=0.5, score_std=2.0, **text_of(codec)
        ).write(place / name)
    return place


def opened(good, place, *rewards, **options):
    names = {name.removeprefix("--"): value for name, value in good.items()}
    names |= {"actor_model_name_or_path": str(place / "actor"), "data_path": ("rows.jsonl",)}
    numbers = {name: int(names[name]) for name in ("max_prompt_seq_len", "max_answer_seq_len")}
    config = PPOConfig(**{**names, **numbers, **options}, reward=rewards)
    config.validate()
    return read_inputs(config)


def test_the_critic_starts_from_a_reward_that_reads_its_tokens_and_has_its_scale(good, reward_models, capsys):
    same, other = str(reward_models / "same"), str(reward_models / "other")
    inputs = opened(good, reward_models, "my.py:good", f"{other}=0.5", f"{same}=2")
    assert [reward.reads_ids for reward in inputs.rewards] == [False, False, True]
    assert [reward.scale.calibration for reward in inputs.rewards] == [RAW, *[Calibration(0.5, 2.0)] * 2]
    assert inputs.critic == same and inputs.scale is inputs.rewards[2].scale
    said = capsys.readouterr().out
    assert f"the critic starts from the reward model {same}" in said
    assert f"the reward model {other} reads text, by its own tokenizer" in said


def test_the_critic_starts_from_the_actor_where_no_reward_reads_its_tokens(good, reward_models, capsys):
    inputs = opened(good, reward_models, "my.py:good")
    assert inputs.critic == str(reward_models / "actor") and inputs.scale.calibration == RAW
    assert "the critic starts from the actor, with a new score head" in capsys.readouterr().out
    alone = opened(good, reward_models, "my.py:good", advantage="rloo", answers_per_prompt=2)
    assert alone.critic is None


def test_the_critic_starts_from_what_is_named_for_it(good, reward_models):
    same = str(reward_models / "same")
    inputs = opened(good, reward_models, "my.py:good", critic_model_name_or_path=same)
    assert inputs.critic == same and inputs.scale.calibration == Calibration(
        0.5, 2.0
    )  # its own, so values begin near 0
    both = opened(good, reward_models, same, critic_model_name_or_path=same)
    assert both.scale is both.rewards[0].scale


@pytest.mark.parametrize(
    "calibration, known",
    [("auto", [True, True]), ("rollout", [False, False]), ("none", [True, True]), ("running", [False] * 2)],
)
def test_each_reward_is_calibrated_by_itself(good, reward_models, calibration, known):
    inputs = opened(good, reward_models, "my.py:good", str(reward_models / "other"), score_calibration=calibration)
    assert [reward.scale.known for reward in inputs.rewards] == known
    assert [reward.scale.fixed for reward in inputs.rewards] == [calibration != "running"] * 2


def test_rewards_that_read_only_ids_keep_nothing_of_the_data(good, reward_models):
    same = str(reward_models / "same")
    assert set(opened(good, reward_models, same).prompts.train.column_names) == {"prompt_ids", "length", "dialogue"}
    assert "kept" in opened(good, reward_models, same, "my.py:good").prompts.train.column_names


def test_a_reward_model_split_by_another_rule_is_refused(good, reward_models, tmp_path):
    shutil.copytree(reward_models / "other", tmp_path / "leaky")
    written = json.loads((tmp_path / "leaky" / "provenance.json").read_text())
    written |= {"data_path": [str(tmp_path / "rows.jsonl")], "data_split": "1,1,1"}
    (tmp_path / "leaky" / "provenance.json").write_text(json.dumps(written))
    actor = {**good, "--actor_model_name_or_path": str(reward_models / "actor")}
    assert "was trained on" in refusal(step3, {**actor, "--reward": str(tmp_path / "leaky")})


def test_the_readmes_reward_and_command_get_past_the_door(good, reward_models, tmp_path):
    """A file of prompts and answers, and a function, as the first page shows them."""
    page = (ROOT / "README.md").read_text()
    section = page[page.index("## A reward of your own") : page.index("## Which recipe")]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    (tmp_path / "my_reward.py").write_text(code)
    command = shlex.split(re.search(r"step3_ppo/main.py (.*)", section)[1])
    small = ["--actor_model_name_or_path", str(reward_models / "actor"), "--max_answer_seq_len", "8"]
    config = parse(PPOConfig, [*command, *small, "--max_prompt_seq_len", "32"])
    inputs = read_inputs(config)
    (reward,) = inputs.rewards
    batch = trial_batch(inputs.prompts.train["kept"][:2], ["", ""], "It is 4.", [1])
    right = [float(answer in "It is 4.") for answer in batch.columns["answer"]]
    assert reward.scorer.score(batch).numbers == right and reward.scale.calibration == RAW
