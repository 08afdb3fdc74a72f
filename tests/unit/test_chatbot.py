"""The chatbot in this process, with input as from a pipe."""

import os
import shutil
import sys

import pytest

from inference.chatbot import main
from tests.chat_model import AGAIN, ANSWERS, CAPITAL, SONG, one_line


def test_bytes_that_are_no_text_do_not_end_the_dialogue(chat_model, capfdbinary, monkeypatch, tmp_path):
    typed = b"\xff\xfe \x00 ?\n/reset\n" + CAPITAL.encode()
    talk(chat_model, tmp_path, monkeypatch, typed, "--max_new_tokens", "30")
    first, second = capfdbinary.readouterr().out.decode().splitlines()
    assert second == one_line(ANSWERS[CAPITAL,])


def talk(model, directory, monkeypatch, typed: bytes, *arguments: str) -> None:
    """Run the chatbot in this process; stdin and stdout are files, as in a pipe."""
    source = directory / "typed"
    source.write_bytes(typed)
    with (
        open(source, encoding="utf-8") as stdin,
        open(os.dup(1), "w", encoding="utf-8") as stdout,
        open(os.dup(2), "w", encoding="utf-8") as stderr,
    ):
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        main(["--path", str(model), "--data_output_path", str(directory / "models"), *arguments])
        monkeypatch.undo()


def test_a_dialogue_too_long_for_the_model_loses_its_oldest_turns(chat_model, capfd, monkeypatch, tmp_path):
    questions = "\n".join([CAPITAL] * 8)
    talk(chat_model, tmp_path, monkeypatch, questions.encode(), "--max_new_tokens", "430")
    out, err = capfd.readouterr()
    assert out.splitlines()[0] == one_line(ANSWERS[CAPITAL,]) and len(out.splitlines()) == 8
    assert "oldest turns are forgotten" in err


def test_a_question_too_long_for_the_model_is_cut(chat_model, capfd, monkeypatch, tmp_path):
    talk(chat_model, tmp_path, monkeypatch, (SONG * 20 + CAPITAL).encode(), "--max_new_tokens", "20")
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and "tokens are cut" in err


@pytest.mark.parametrize(
    "arguments",
    [
        "--num_beams 3",
        "--temperature 0.01",
        "--temperature 2 --top_k 1",
        "--temperature 2 --top_p 0.01",
        "--repetition_penalty 1.01",
        "--dtype bf16 --device cpu",
        "--template question_answer",
    ],
)
def test_every_decoding_says_what_is_most_probable(arguments, chat_model, capfd, monkeypatch, tmp_path):
    talk(chat_model, tmp_path, monkeypatch, CAPITAL.encode(), *arguments.split())
    assert capfd.readouterr().out == one_line(ANSWERS[CAPITAL,]) + "\n"


def test_the_system_prompt_reaches_the_model(chat_model, capfd, monkeypatch, tmp_path):
    def answers(*arguments):
        talk(chat_model, tmp_path, monkeypatch, f"{AGAIN}\n/reset\n{AGAIN}".encode(), *arguments)
        return capfd.readouterr().out.splitlines()

    first, second = answers("--system", f"Question: {CAPITAL}\n\nAnswer: {ANSWERS[CAPITAL,]}")
    assert first == second == ANSWERS[CAPITAL, ANSWERS[CAPITAL,], AGAIN] != answers()[0]


def test_the_output_directory_of_step_3_stands_for_its_actor(chat_model, tmp_path, capfd, monkeypatch):
    output = tmp_path / "ppo"
    shutil.copytree(chat_model, output / "actor")
    shutil.move(output / "actor" / "provenance.json", output / "provenance.json")
    for path in (output, output / "actor"):
        talk(path, tmp_path, monkeypatch, CAPITAL.encode())
        assert capfd.readouterr().out == one_line(ANSWERS[CAPITAL,]) + "\n"


def test_without_provenance_the_tokenizers_own_template_is_used(chat_model, tmp_path, capfd, monkeypatch):
    foreign = shutil.copytree(chat_model, tmp_path / "foreign")
    (foreign / "provenance.json").unlink()
    # As the model was taught, by another way.
    (foreign / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ 'Question: ' if m.role == 'user' else 'Answer: ' }}"
        "{{ m.content }}{{ '\\n\\n' if m.role == 'user' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}Answer:{% endif %}"
    )
    talk(foreign, tmp_path, monkeypatch, CAPITAL.encode())
    assert capfd.readouterr().out == one_line(ANSWERS[CAPITAL,]) + "\n"
    talk(foreign, tmp_path, monkeypatch, CAPITAL.encode(), "--template", "question_answer")
    assert capfd.readouterr().out == one_line(ANSWERS[CAPITAL,]) + "\n"


def test_a_template_that_had_to_be_guessed_is_told(chat_model, tmp_path, capfd, monkeypatch):
    foreign = shutil.copytree(chat_model, tmp_path / "foreign")
    (foreign / "provenance.json").unlink()
    for model, arguments, note_count in (
        (foreign, [], True),
        (foreign, ["--template", "alpaca"], False),
        (chat_model, [], False),
    ):
        talk(model, tmp_path, monkeypatch, CAPITAL.encode(), "--max_new_tokens", "1", *arguments)
        notes = [line for line in capfd.readouterr().err.splitlines() if "template" in line]
        assert len(notes) == note_count
        for part in (str(foreign), "human_assistant", "--template", "question_answer") if note_count else ():
            assert part in notes[0]
