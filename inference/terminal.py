"""Lines in, text out: a person at a terminal, or a pipe."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator

from common.runtime.terminal import escape_controls


class Terminal:
    """Standard input and output; questions are asked for only where a person reads the answers.

    In a pipe an answer is one line, so that line N of the output answers question N. Notices go to stderr.
    """

    def __init__(self):
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")
        if self.interactive:
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # its import gives input() line editing

    def questions(self) -> Iterator[str]:
        """Lines without surrounding white space, empty ones left out, until the input ends."""
        while True:
            try:
                line = input("> " if self.interactive else "").strip()
            except EOFError:
                if self.interactive:
                    print()
                return
            if line:
                yield line

    def write(self, text: str) -> None:
        """Show a piece of an answer now."""
        print(escape_controls(text if self.interactive else text.replace("\n", " ")), end="", flush=True)

    def end_answer(self) -> None:
        print(flush=True)

    def notice(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
