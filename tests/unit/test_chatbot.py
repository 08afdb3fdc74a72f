"""The chatbot as a program: in a pipe and at a terminal."""
import os
import pty
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_model import AGAIN, ANSWERS, CAPITAL, RED, SING, SONG
from inference.chatbot import main

PROGRAM = str(Path(__file__).resolve().parents[2] / "inference" / "chatbot.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
DEADLINE = 120  # seconds; only a chatbot that hangs comes near


def one_line(text: str) -> str:
    return text.replace("\n", " ")


def test_in_a_pipe_every_question_gets_one_line(chat_model, tmp_path):
    lines = [CAPITAL, "", "   ", AGAIN, "/reset", AGAIN, "/reset", RED, "/dance", "/help", "/reset", CAPITAL,
             "/quit", CAPITAL]
    done = subprocess.run([sys.executable, PROGRAM, "--path", chat_model], input="\n".join(lines).encode(),
                          capture_output=True, env=ENVIRONMENT, cwd=tmp_path, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    red = ANSWERS[RED,].replace("\x1b", "\u241b").replace("\x07", "\u2407")
    capital = one_line(ANSWERS[CAPITAL,])
    assert done.stdout.decode() == "\n".join(
        [capital, ANSWERS[CAPITAL, ANSWERS[CAPITAL,], AGAIN], ANSWERS[AGAIN,], red, capital, ""])
    assert "no command /dance" in done.stderr.decode() and "/reset" in done.stderr.decode()
    assert not list(tmp_path.iterdir()), "talking writes nothing"


def test_bytes_that_are_no_text_do_not_end_the_dialogue(chat_model, capfdbinary, monkeypatch, tmp_path):
    typed = b"\xff\xfe \x00 ?\n/reset\n" + CAPITAL.encode()
    talk(chat_model, tmp_path, monkeypatch, typed, "--max_new_tokens", "30")
    first, second = capfdbinary.readouterr().out.decode().splitlines()
    assert second == one_line(ANSWERS[CAPITAL,])


class Terminal:
    """A chatbot at a pseudo-terminal."""

    def __init__(self, *arguments: str):
        self.screen, end = pty.openpty()
        # The first terminal that a new session opens is the one whose Ctrl-C it gets.
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, *arguments], stdin=end, stdout=end, stderr=end, start_new_session=True,
            env={**ENVIRONMENT, "TERM": "dumb"},
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))
        os.close(end)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def read_until(self, wanted: str) -> str:
        """What appears up to and with `wanted`."""
        seen = b""
        while wanted.encode() not in seen:
            ready, _, _ = select.select([self.screen], [], [], DEADLINE)
            assert ready, f"waited for {wanted!r}, got {seen!r}"
            seen += os.read(self.screen, 1)
        return seen.decode(errors="replace").replace("\r\n", "\n")

    def interrupt(self) -> int:
        """Press Ctrl-C until the program answers; one that comes just before input() waits is lost."""
        for _ in range(DEADLINE):
            self.type("\x03")
            if select.select([self.screen], [], [], 1)[0]:
                break
        return self.close()

    def close(self) -> int:
        try:
            return self.process.wait(DEADLINE)
        finally:
            self.process.kill()
            os.close(self.screen)


def test_at_a_terminal_answers_stream_and_ctrl_c_stops_them(chat_model):
    terminal = Terminal("--path", str(chat_model), "--max_new_tokens", "450")
    assert str(chat_model) in terminal.read_until("\n> ")
    terminal.type(CAPITAL + "\n")
    assert ANSWERS[CAPITAL,] in terminal.read_until("\n> "), "line ends stay line ends"
    terminal.type("/reset\n")
    terminal.read_until("> ")
    terminal.type(SING + "\n")
    terminal.read_until("la la la")  # long before the 450 tokens are there
    terminal.type("\x03")
    song = terminal.read_until("[stopped]")
    assert 0 <= song.count("la") < 400
    terminal.read_until("> ")
    terminal.type("/help\n")
    assert "/quit" in terminal.read_until("\n> ")
    assert terminal.interrupt() == 130


def test_at_a_terminal_the_end_of_input_ends_it(chat_model):
    terminal = Terminal("--path", str(chat_model))
    terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.close() == 0


def talk(model, directory, monkeypatch, typed: bytes, *arguments: str) -> None:
    """Run the chatbot in this process; stdin and stdout are files, as in a pipe."""
    source = directory / "typed"
    source.write_bytes(typed)
    with open(source, encoding="utf-8") as stdin, open(os.dup(1), "w", encoding="utf-8") as stdout, \
            open(os.dup(2), "w", encoding="utf-8") as stderr:
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


@pytest.mark.parametrize("arguments", [
    "--num_beams 3", "--temperature 0.01", "--temperature 2 --top_k 1", "--temperature 2 --top_p 0.01",
    "--repetition_penalty 1.01", "--dtype bf16 --device cpu", "--template question_answer"])
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
        "{% if add_generation_prompt %}Answer:{% endif %}")
    talk(foreign, tmp_path, monkeypatch, CAPITAL.encode())
    assert capfd.readouterr().out == one_line(ANSWERS[CAPITAL,]) + "\n"
    talk(foreign, tmp_path, monkeypatch, CAPITAL.encode(), "--template", "question_answer")
    assert capfd.readouterr().out == one_line(ANSWERS[CAPITAL,]) + "\n"


def test_a_template_that_had_to_be_guessed_is_told(chat_model, tmp_path, capfd, monkeypatch):
    foreign = shutil.copytree(chat_model, tmp_path / "foreign")
    (foreign / "provenance.json").unlink()
    for model, arguments, told in ((foreign, [], True), (foreign, ["--template", "alpaca"], False),
                                   (chat_model, [], False)):
        talk(model, tmp_path, monkeypatch, CAPITAL.encode(), "--max_new_tokens", "1", *arguments)
        notes = [line for line in capfd.readouterr().err.splitlines() if "template" in line]
        assert len(notes) == told
        for part in (str(foreign), "human_assistant", "--template", "question_answer") if told else ():
            assert part in notes[0]
