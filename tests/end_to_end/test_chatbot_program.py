"""The chatbot as a process of its own: in a pipe and at a terminal."""

import os
import pty
import select
import subprocess
import sys

from common.paths import ROOT
from tests.chat_model import AGAIN, ANSWERS, CAPITAL, RED, SING, one_line

PROGRAM = str(ROOT / "inference" / "chatbot.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
DEADLINE = 120  # seconds; only a chatbot that hangs comes near


def test_in_a_pipe_every_question_gets_one_line(chat_model, tmp_path):
    lines = [
        CAPITAL,
        "",
        "   ",
        AGAIN,
        "/reset",
        AGAIN,
        "/reset",
        RED,
        "/dance",
        "/help",
        "/reset",
        CAPITAL,
        "/quit",
        CAPITAL,
    ]
    done = subprocess.run(
        [sys.executable, PROGRAM, "--path", chat_model],
        input="\n".join(lines).encode(),
        capture_output=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    red = ANSWERS[RED,].replace("\x1b", "\u241b").replace("\x07", "\u2407")
    capital = one_line(ANSWERS[CAPITAL,])
    assert done.stdout.decode() == "\n".join(
        [capital, ANSWERS[CAPITAL, ANSWERS[CAPITAL,], AGAIN], ANSWERS[AGAIN,], red, capital, ""]
    )
    assert "no command /dance" in done.stderr.decode() and "/reset" in done.stderr.decode()
    assert not list(tmp_path.iterdir()), "talking writes nothing"


class Terminal:
    """A chatbot at a pseudo-terminal."""

    def __init__(self, *arguments: str):
        self.screen, end = pty.openpty()
        # The first terminal that a new session opens is the one whose Ctrl-C it gets.
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, *arguments],
            stdin=end,
            stdout=end,
            stderr=end,
            start_new_session=True,
            env={**ENVIRONMENT, "TERM": "dumb"},
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
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
