"""A step must split data by the same rule as the steps before it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.artifacts.provenance import read_provenance
from common.artifacts.publish import publishing
from common.artifacts.split_rule import check_split_rule, data_request, key_rule, known_openings
from common.config.parser import parse
from common.data.prepare import prepare
from common.data.split import prefix_hashes
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import UserError
from common.models.builtin import materialise
from inference.options import PromptOptions
from inference.prompts import held_out_prompts
from step1_sft.config import SFTConfig
from step3_ppo.config import PPOConfig
from tests.chat_model import provenance_of
from tests.preparation import write
from tests.tokenizers_built import byte_level_bpe

HELLO = prefix_hashes(["Hello"])


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return make_codec(load_tokenizer(str(byte_level_bpe(tmp_path_factory.mktemp("bpe")))), "human_assistant")


def greeted(count: int) -> list[dict]:
    return [
        {
            "prompt": [
                {"role": role, "content": text}
                for role, text in (("user", "Hello"), ("assistant", "Hello!"), ("user", f"What is {i}?"))
            ],
            "response": "A number.",
        }
        for i in range(count)
    ]


def sft(tmp_path, **given) -> SFTConfig:
    given = {
        "data_path": tmp_path / "d.jsonl",
        "output_dir": tmp_path / "sft",
        "model_name_or_path": "builtin:tiny-opt",
        "data_output_path": tmp_path / "data",
        "data_split": "1,1,1",
        "eval_fraction": 0.2,
        **given,
    }
    return parse(SFTConfig, [word for name, value in given.items() for word in (f"--{name}", str(value))])


def ppo(tmp_path, **given) -> PPOConfig:
    given = {
        "data_path": tmp_path / "d.jsonl",
        "output_dir": tmp_path / "ppo",
        "data_split": "1,1,1",
        "actor_model_name_or_path": tmp_path / "sft",
        "critic_model_name_or_path": tmp_path / "reward",
        "data_output_path": tmp_path / "data",
        "eval_fraction": 0.2,
        **given,
    }
    return parse(PPOConfig, [word for name, value in given.items() for word in (f"--{name}", str(value))])


def made(config, codec, step: str = "sft") -> None:
    """What a step leaves, but for the training."""
    Path(config.output_dir).mkdir(exist_ok=True)
    data = prepare(data_request(config, "demonstration", 200), codec)
    with publishing(config, codec, {}, step=step, base="x", data=data):
        shutil.copytree(
            materialise("builtin:tiny-opt", Path(config.output_dir).parent), config.output_dir, dirs_exist_ok=True
        )


def test_a_step_keys_openings_as_the_one_before_though_the_data_has_grown(tmp_path, codec):
    write(tmp_path / "d.jsonl", greeted(60))
    made(sft(tmp_path), codec)
    provenance = read_provenance(tmp_path / "sft")
    assert provenance.split_by == "auto"
    assert provenance.shared_openings == {str((tmp_path / "d.jsonl").resolve()): HELLO}
    write(tmp_path / "d.jsonl", greeted(60) + [{"prompt": f"{i}?", "response": "Yes."} for i in range(7000)])
    config = ppo(tmp_path)
    check_split_rule(provenance, config, "the actor")
    assert known_openings(config) == {str(tmp_path / "d.jsonl"): HELLO}
    assert known_openings(ppo(tmp_path, data_path=tmp_path)) == {str(tmp_path): HELLO}  # which holds the file
    assert data_request(config, "prompt", 200).shared == {str(tmp_path / "d.jsonl"): HELLO}


def test_a_result_that_does_not_say_was_split_by_the_opening(tmp_path, codec):
    path = write(tmp_path / "d.jsonl", greeted(60))
    (tmp_path / "sft").mkdir()
    old = provenance_of(codec, "sft")
    old.write(tmp_path / "sft")
    text = (tmp_path / "sft" / "provenance.json").read_text().replace('"data_path": []', f'"data_path": ["{path}"]')
    lines = [line for line in text.splitlines() if "split_by" not in line and "shared_openings" not in line]
    (tmp_path / "sft" / "provenance.json").write_text("\n".join(lines))
    config = ppo(tmp_path, data_split="2,4,4", eval_fraction=0.05)
    check_split_rule(read_provenance(tmp_path / "sft"), config, "the actor")
    assert known_openings(config) == {path: []}
    assert known_openings(ppo(tmp_path, data_path="builtin:courtesy")) == {}


def test_two_ways_to_split_the_same_data_are_refused_by_name(tmp_path, codec):
    write(tmp_path / "d.jsonl", greeted(60))
    made(sft(tmp_path), codec)
    provenance = read_provenance(tmp_path / "sft")
    with pytest.raises(UserError, match="--eval_fraction 0.2; now .* --eval_fraction 0.2 and --split_by prompt"):
        check_split_rule(provenance, ppo(tmp_path, split_by="prompt"), "the actor")
    with pytest.raises(UserError, match=f"--actor_model_name_or_path {tmp_path}/sft was trained on .* --split_by auto"):
        known_openings(ppo(tmp_path, split_by="opening"))
    made(
        sft(tmp_path, output_dir=tmp_path / "reward", split_by="opening", data_split="1,0,0", eval_fraction=0),
        codec,
        "reward",
    )
    with pytest.raises(UserError, match=f"{tmp_path}/sft and --critic_model_name_or_path {tmp_path}/reward were"):
        known_openings(ppo(tmp_path))
    made(sft(tmp_path, output_dir=tmp_path / "reward"), codec, "reward")
    assert known_openings(ppo(tmp_path)) == {str(tmp_path / "d.jsonl"): HELLO}


def test_other_data_is_keyed_by_all_that_the_model_was_trained_on(tmp_path, codec):
    write(tmp_path / "d.jsonl", greeted(60))
    made(sft(tmp_path), codec)
    provenance = read_provenance(tmp_path / "sft")
    for source in (str(tmp_path / "d.jsonl"), "elsewhere.jsonl"):
        assert key_rule(provenance, source).key(["Hello", "q"]).turns == 2


@pytest.mark.parametrize("own_test_data", [False, True])
def test_evaluation_finds_what_training_held_out(tmp_path, codec, own_test_data):
    write(tmp_path / "set" / "train.jsonl", greeted(100))
    if own_test_data:
        write(tmp_path / "set" / "test.jsonl", greeted(105)[95:])
    config = sft(tmp_path, data_path=tmp_path / "set")
    data = prepare(data_request(config, "demonstration", 200), codec)
    made(config, codec)
    options = PromptOptions(data_path=(str(tmp_path / "set"),))
    found = held_out_prompts(options, [read_provenance(tmp_path / "sft")] * 2, seed=0)
    held_out = {tuple(row["prompt_ids"]) for row in data.eval}
    assert len(found) > 5 and {tuple(codec.encode_prompt(prompt)) for prompt in found} >= held_out
    trained = {tuple(row["prompt_ids"]) for row in data.train}
    assert trained.isdisjoint(tuple(codec.encode_prompt(prompt)) for prompt in found)


def test_evaluation_goes_by_the_column_that_training_went_by(tmp_path, codec):
    path = write(tmp_path / "d.jsonl", [{**row, "conv": at // 4} for at, row in enumerate(greeted(100))])
    config = sft(tmp_path, split_by="column:conv")
    data = prepare(data_request(config, "demonstration", 200), codec)
    made(config, codec)
    provenance = read_provenance(tmp_path / "sft")
    found = held_out_prompts(PromptOptions(data_path=(path,)), [provenance], seed=0)
    assert {tuple(codec.encode_prompt(prompt)) for prompt in found} == {tuple(row["prompt_ids"]) for row in data.eval}
    other = replace(provenance, split_by="column:id")
    with pytest.raises(UserError, match="--split_by column:conv and column:id"):
        held_out_prompts(PromptOptions(data_path=(path,)), [provenance, other], seed=0)
