"""Reads questions from standard input and writes responses to standard output, at a terminal or in a pipe."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator

from common.runtime.terminal import escape_controls


class Terminal:
    """Standard input and output. A prompt sign is shown only if both are a terminal.

    In a pipe a response is one line, so line N of the output responds to question N. Notices go to stderr.
    """

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if self.interactive:
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # importing it gives input() line editing

    def questions(self) -> Iterator[str]:
        """The lines of the input, stripped of white space and without empty ones."""
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
        """Show a piece of a response now."""
        print(escape_controls(text if self.interactive else text.replace("\n", " ")), end="", flush=True)

    def end_response(self) -> None:
        print(flush=True)

    def notice(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
