"""Responses to a file of prompts, as inference/generate.py writes them."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.config.parser import parse
from common.data.blend import parse_data_path
from common.data.reading import ReadReport, read_records
from common.data.tokenization import load_tokenizer, make_codec
from common.errors import TrainingFailure, UserError
from common.runtime.terminal import escape_controls
from inference.generate import GenerateConfig, main
from inference.prompts import read_prompts
from tests.chat_model import AGAIN, ANSWERS, CAPITAL, RED, SING, prompt_of, provenance_of


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def messages(turns) -> list[dict]:
    return [{"role": message.role, "content": message.content} for message in prompt_of(turns).messages]


def test_every_prompt_gets_its_answer_in_the_order_of_the_file(chat_model, tmp_path):
    asked = [*ANSWERS] * 4
    data = write(tmp_path / "prompts.jsonl", [{"prompt": messages(turns)} for turns in asked])
    output = tmp_path / "new" / "answers.jsonl"
    main(["--path", str(chat_model), "--data_path", data, "--output_file", str(output), "--batch_size", "3"])
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["response"] for row in rows] == [ANSWERS[turns] for turns in asked]
    for row, turns in zip(rows, asked):
        assert row["prompt"] == (turns[0] if len(turns) == 1 else messages(turns))

    report = ReadReport()
    written = read_records(parse_data_path([str(output)]), "demonstration", report=report)
    assert [(sourced.record.prompt, sourced.record.response) for sourced in written] == [
        (prompt_of(turns), ANSWERS[turns]) for turns in asked
    ], "training reads what was written"
    report.check(0.0)


@pytest.mark.parametrize(
    "question, turns",
    [
        (CAPITAL, (CAPITAL,)),
        (f"Human: {CAPITAL}\n\nAssistant: {ANSWERS[CAPITAL,]}\n\nHuman: {AGAIN}", (CAPITAL, ANSWERS[CAPITAL,], AGAIN)),
    ],
)
def test_one_prompt_is_answered_on_standard_output(question, turns, chat_model, capsys):
    main(["--path", str(chat_model), "--prompt", question, "--num_beams", "2"])
    assert json.loads(capsys.readouterr().out)["response"] == ANSWERS[turns]


def test_a_guessed_template_is_told_beside_the_answers_not_among_them(chat_model, tmp_path, capsys):
    foreign = shutil.copytree(chat_model, tmp_path / "foreign")
    (foreign / "provenance.json").unlink()
    main(["--path", str(foreign), "--prompt", CAPITAL, "--max_new_tokens", "2"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["prompt"] == CAPITAL
    assert "human_assistant" in printed.err and "--template" in printed.err


def test_a_flag_given_twice_is_told_beside_the_answers(chat_model, capsys):
    main(["--path", str(chat_model), "--prompt", CAPITAL, "--max_new_tokens", "3", "--max_new_tokens", "2"])
    printed = capsys.readouterr()
    assert "note: --max_new_tokens 2 takes the place of --max_new_tokens 3" in printed.err.splitlines()
    assert json.loads(printed.out)["prompt"] == CAPITAL


def test_other_columns_and_fewer_prompts(chat_model, tmp_path):
    data = write(tmp_path / "prompts.jsonl", [{"q": question} for question in (RED, AGAIN, CAPITAL)])
    output = tmp_path / "answers.jsonl"
    main(
        [
            "--path",
            str(chat_model),
            "--data_path",
            data,
            "--columns",
            "prompt=q",
            "--max_prompts",
            "2",
            "--output_file",
            str(output),
        ]
    )
    assert [json.loads(line)["response"] for line in output.read_text().splitlines()] == [
        ANSWERS[RED,],
        ANSWERS[AGAIN,],
    ]


def test_prompts_are_read_from_files_as_they_come(tmp_path, capsys):
    data = tmp_path / "prompts.json"
    data.write_bytes(
        '{"old": [{"prompt": "no"}], "new": [{"prompt": "O\u00f9 \u00e7a?"}, {"prompt": "L\u00e0."}]}'.encode("cp1252")
    )
    arguments = ["--data_path", str(data), "--data_field", "new", "--encoding", "cp1252"]
    prompts = list(read_prompts(parse(GenerateConfig, arguments)))
    assert [prompt.first_user_turn for prompt in prompts] == ["O\u00f9 \u00e7a?", "L\u00e0."]
    data.write_text('// two questions\n{"prompt": "a"}\n{"prompt": "b"}\n')
    assert len(list(read_prompts(parse(GenerateConfig, arguments)))) == 2
    assert capsys.readouterr().err == f"note: {data}: 1 comment line skipped\n"


def test_a_prompt_too_long_for_the_model_is_cut_and_that_is_said(chat_model, capsys):
    main(["--path", str(chat_model), "--prompt", "la " * 2000 + CAPITAL, "--max_new_tokens", "20"])
    said = capsys.readouterr()
    assert "note: 1 of 1 prompts are too long for the model" in said.err and len(said.out.splitlines()) == 1


def test_answers_hold_nothing_that_a_terminal_obeys_and_lose_nothing(chat_model, capsys):
    question = f"{RED}\x9b31m\u202e\x7f"
    main(["--path", str(chat_model), "--prompt", question, "--max_new_tokens", "4"])
    (line,) = capsys.readouterr().out.splitlines()
    assert escape_controls(line) == line and json.loads(line)["prompt"] == question


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--prompt"),
        (["--prompt", "a", "--data_path", "b"], "--prompt"),
        (["--prompt", "a\0b"], "--prompt"),
        (["--data_path", "./nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompt", "a", "--output_file", "/dev/null/answers"], "--output_file"),
        (["--prompt", "a", "--answers_per_prompt", "3"], "--temperature 1, or search with --num_beams 3"),
        (["--prompt", "a", "--answers_per_prompt", "3", "--num_beams", "2"], "raise --num_beams"),
        (["--prompt", "a", "--keep_columns", "b"], "--keep_columns works only with --reward"),
        (["--prompt", "a", "--reward", "./no.py:f"], "--reward ./no.py:f: there is no file"),
        (["--prompt", "a", "--reward", "./no/judge"], "--reward ./no/judge"),
    ],
)
def test_wrong_requests_get_one_line_before_a_model_is_loaded(arguments, said):
    with pytest.raises(UserError) as raised:
        main(["--path", "./no/such/model", *arguments])
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_no_room_for_the_answers_is_one_line(chat_model):
    with pytest.raises(TrainingFailure, match="--output_file /dev/full: cannot be written: No space left on device"):
        main(["--path", str(chat_model), "--prompt", CAPITAL, "--max_new_tokens", "4", "--output_file", "/dev/full"])


def rows_of(capsys, *arguments) -> list[dict]:
    main([*arguments, "--max_new_tokens", "20"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("how", [("--num_beams", "4"), ("--temperature", "1.5", "--seed", "3")])
def test_several_answers_to_each_prompt_follow_one_another(how, chat_model, tmp_path, capsys):
    data = write(tmp_path / "prompts.jsonl", [{"prompt": question} for question in (SING, RED, CAPITAL)])
    common = ["--path", str(chat_model), "--data_path", data, "--batch_size", "2", *how]
    rows = rows_of(capsys, *common, "--answers_per_prompt", "3")
    assert [row["prompt"] for row in rows] == [SING] * 3 + [RED] * 3 + [CAPITAL] * 3
    assert all(len({row["response"] for row in rows[start : start + 3]}) > 1 for start in (0, 3, 6))
    if "--num_beams" in how:
        assert rows[::3] == rows_of(capsys, *common), "the best comes first"


def test_answers_are_scored_by_any_rewards(chat_model, tmp_path, monkeypatch, capsys):
    """By functions with columns of the data, prompt by prompt although batches are sorted, and by a reward model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(
        "def length(responses): return [len(text) for text in responses]\n"
        "def level(responses, answer, prompts): return [float(right) for right in answer]\n"
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(chat_model, num_labels=1).save_pretrained("judge")
    AutoTokenizer.from_pretrained(chat_model).save_pretrained("judge")
    provenance_of(make_codec(load_tokenizer("judge"), "question_answer"), "reward").write("judge")
    rows = [{"prompt": question, "answer": at} for at, question in enumerate((CAPITAL, SING, RED, CAPITAL))]
    common = [
        "--path",
        str(chat_model),
        "--data_path",
        write(tmp_path / "prompts.jsonl", rows),
        "--data_output_path",
        "d",
    ]
    common += ["--temperature", "1", "--answers_per_prompt", "2"]
    found = rows_of(capsys, *common, "--reward", "my.py:length=-2", "my.py:level", "./judge=3")
    assert [row["reward/level"] for row in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    for row in found:
        assert row["reward/length"] == len(row["response"])
        total = -2 * row["reward/length"] + row["reward/level"] + 3 * row["reward/judge"]
        assert row["score"] == pytest.approx(total)
    assert [row["response"] for row in rows_of(capsys, *common)] == [row["response"] for row in found]
    (alone,) = rows_of(capsys, "--path", str(chat_model), "--prompt", RED, "--reward", "my.py:length")
    assert alone["score"] == len(alone["response"])
