"""Columns of the data that are kept beside the ids of prompts, for rewards."""

import json
from dataclasses import replace
from datetime import date

import pytest
import torch
from datasets import Dataset

from common.data.keeping import KEPT, KeptColumns, messages_of, prompt_of
from common.data.options import naming_flags
from common.data.prepare import prepare
from common.data.records import Message, Prompt
from common.data.request import data_key
from common.data.tokenization import load_tokenizer, make_codec
from common.data.values import BadRow
from common.errors import UserError
from common.rewards.function import Function
from common.rewards.opening import kept_columns
from step3_ppo.generation.rollout import Rollout
from step3_ppo.reward import RewardInputs
from tests.preparation import request
from tests.tokenizers_built import byte_level_bpe

ROWS = [{"prompt": f"What is {n}?", "answer": str(n), "tests": [{"in": n}], "note": "x"} for n in range(20)]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return make_codec(load_tokenizer(str(byte_level_bpe(tmp_path_factory.mktemp("bpe")))), "human_assistant")


def asked(tmp_path, rows, keep, name="d.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(request(tmp_path, str(path), kind="prompt"), keep=keep, phase=None, eval_fraction=0.0)


def kept(data) -> list[dict]:
    return [json.loads(text) for text in data.train[KEPT]]


def test_what_is_kept_stands_beside_the_ids_with_the_dialogue_and_the_row(tmp_path, codec):
    data = prepare(asked(tmp_path, ROWS, KeptColumns(("answer",), ("tests", "missing"))), codec)
    assert len(data.train) == 20
    for row in kept(data):
        number = int(row["columns"]["answer"])
        assert row["columns"] == {"answer": str(number), "tests": [{"in": number}]}
        assert row["messages"] == [{"role": "user", "content": f"What is {number}?"}]
        assert row["row"].endswith(f"d.jsonl:{number + 1}")
    assert not [note for note in data.report.lines() if "answer" in note]  # it is used


def test_all_columns_are_kept_where_all_are_named(tmp_path, codec):
    data = prepare(asked(tmp_path, ROWS, KeptColumns(everything=True)), codec)
    assert all(row["columns"].keys() == ROWS[0].keys() for row in kept(data))


def test_what_is_kept_is_part_of_the_key_and_nothing_kept_changes_none(tmp_path, codec):
    plain = asked(tmp_path, ROWS, None)
    assert set(prepare(plain, codec).train.column_names) == {"prompt_ids", "length", "dialogue"}
    answer = ("answer",)
    keeps = [None, KeptColumns(), KeptColumns(answer), KeptColumns((), answer), KeptColumns(everything=True)]
    keys = [data_key(replace(plain, keep=keep), codec) for keep in keeps]
    assert len(set(keys)) == len(keys)
    named = KeptColumns(("answer",), declared={"answer": "my.py:f"})
    assert data_key(replace(plain, keep=named), codec) == keys[2]


def test_a_prompt_with_two_answers_is_two_prompts(tmp_path, codec):
    rows = [{"prompt": "What is it?", "answer": answer} for answer in ("one", "two", "one")]
    assert len(prepare(asked(tmp_path, rows, None), codec).train) == 1
    assert len(prepare(asked(tmp_path, rows, KeptColumns(("answer",))), codec).train) == 2


@pytest.mark.parametrize("value", (None, "absent"))
def test_a_row_without_a_column_is_a_bad_row_named_by_its_line(tmp_path, codec, value):
    rows = [dict(row) for row in ROWS]
    rows[4]["answer"] = None
    if value == "absent":
        del rows[4]["answer"]
    asking = asked(tmp_path, rows, KeptColumns(("answer",)))
    with pytest.raises(UserError, match=r"1 of 20 rows cannot be used.*d.jsonl:5.*'answer' is missing"):
        with naming_flags():
            prepare(asking, codec)
    assert len(prepare(replace(asking, max_bad_fraction=0.1), codec).train) == 19


@pytest.mark.parametrize(
    "declared, said",
    [
        ({}, "--keep_columns anwser: "),
        ({"anwser": "my.py:correct"}, "--reward my.py:correct: its parameter anwser is a column of the data, but "),
    ],
)
def test_a_column_that_no_file_has_is_one_line_with_those_there_are(tmp_path, codec, declared, said):
    with pytest.raises(UserError) as error, naming_flags():
        prepare(asked(tmp_path, ROWS, KeptColumns(("anwser",), declared=declared)), codec)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert "did you mean answer?; it has answer, note, prompt, tests" in str(error.value)


def test_a_parameter_that_is_nearly_one_of_a_rewards_own_is_advised_as_such(tmp_path, codec):
    columns = kept_columns([Function("my.py:f", len, ("prompts",), ("response",), (), False)], [])
    with pytest.raises(UserError, match=r"its parameter response is .* none of that name; did you mean responses\?"):
        prepare(asked(tmp_path, ROWS, columns), codec)


@pytest.mark.parametrize("first", (True, False))
def test_a_source_of_a_blend_without_a_column_is_named_with_the_reward_that_needs_it(tmp_path, codec, first):
    asking = asked(tmp_path, ROWS, KeptColumns(("answer",), declared={"answer": "my.py:correct"}))
    others = asked(tmp_path, [{"prompt": "Why?"}] * 20, None, "others.jsonl").data_path
    both = asking.data_path + others if first else others + asking.data_path
    said = "^--reward my.py:correct: its parameter answer is a column of the data, but .*others.jsonl has none of that"
    with pytest.raises(UserError, match=said), naming_flags():
        prepare(replace(asking, data_path=both), codec)


def test_values_of_other_formats_are_kept_as_json_has_them():
    columns = KeptColumns(everything=True)
    assert json.loads(columns.of({"day": date(2024, 2, 29), "scores": torch.tensor([1.0, 2.0])})) == {
        "day": "2024-02-29",
        "scores": [1.0, 2.0],
    }
    assert json.loads(columns.of({"half": "\ud83d"}).encode()) == {"half": "\ud83d"}  # of a surrogate pair
    with pytest.raises(BadRow, match="'image' is no text, number, list or object"):
        columns.of({"image": b"png"})


def test_a_dialogue_is_the_same_after_it_was_kept():
    prompt = Prompt(
        (
            Message("system", "Be brief."),
            Message("user", "Why?"),
            Message("assistant", "", '{"tool_calls": [{"name": "look"}]}'),
            Message("tool", "there"),
        )
    )
    assert prompt_of(json.loads(json.dumps(messages_of(prompt)))) == prompt


def test_a_reward_gets_the_same_columns_whatever_responses_its_rank_made(codec):
    """A parameter with a default is left out only where no response of the iteration has its column."""
    columns = ({"hint": "short"}, {})
    kept = [json.dumps({"columns": each, "messages": [], "row": f"a.jsonl:{at}"}) for at, each in enumerate(columns)]
    dataset = Dataset.from_dict({"prompt_ids": [[5], [6]], "length": [1, 1], KEPT: kept})
    inputs = RewardInputs(responses_to(torch.tensor([0, 1]), codec), codec, dataset)
    assert [inputs.batch([at]).columns for at in (0, 1)] == [{"hint": ["short"]}, {"hint": [None]}]


def responses_to(prompt_index: torch.Tensor, codec) -> Rollout:
    """A prompt of two tokens and a response of two for each."""
    rows = len(prompt_index)
    return Rollout(
        torch.tensor([[5, 6, 7, codec.end_id]] * rows),
        torch.full((rows,), 2),
        torch.full((rows,), 2),
        torch.ones(rows, dtype=torch.bool),
        prompt_index,
        torch.ones(rows, dtype=torch.bool),
        torch.zeros(rows, dtype=torch.long),
    )


def test_a_reward_gets_the_columns_of_each_responses_own_row(tmp_path, codec):
    data = prepare(asked(tmp_path, ROWS, KeptColumns(("answer",))), codec)
    dataset, answers = data.train, [row["columns"]["answer"] for row in kept(data)]
    rollout = responses_to(torch.tensor([7, 2, 2]), codec)
    inputs = RewardInputs(rollout, codec, dataset)
    assert inputs.columns["answer"] == [answers[7], answers[2], answers[2]]
    batch = inputs.batch([2, 0])
    assert batch.columns == {"answer": [answers[2], answers[7]]}
    assert batch.messages[1] == [{"role": "user", "content": f"What is {answers[7]}?"}]
    assert batch.rows[0].endswith(f":{int(answers[2]) + 1}") and batch.response_ids == [[7, codec.end_id]] * 2
    without = RewardInputs(rollout, codec, dataset.remove_columns(KEPT))
    assert "answer" not in without.columns
    with pytest.raises(ValueError, match="--keep_columns"):
        _ = without.messages
