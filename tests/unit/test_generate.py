"""Responses to a file of prompts, as inference/generate.py writes them."""

import json
import shutil

import pytest

from common.config.parser import parse
from common.data.blend import parse_data_path
from common.data.reading import ReadReport, read_records
from common.errors import TrainingFailure, UserError
from common.runtime.terminal import escape_controls
from inference.generate import GenerateConfig, main
from inference.prompts import read_prompts
from tests.chat_model import AGAIN, ANSWERS, CAPITAL, RED, prompt_of


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
    ],
)
def test_wrong_requests_get_one_line_before_a_model_is_loaded(arguments, said):
    with pytest.raises(UserError) as raised:
        main(["--path", "./no/such/model", *arguments])
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_no_room_for_the_answers_is_one_line(chat_model):
    with pytest.raises(TrainingFailure, match="--output_file /dev/full: cannot be written: No space left on device"):
        main(["--path", str(chat_model), "--prompt", CAPITAL, "--max_new_tokens", "4", "--output_file", "/dev/full"])
