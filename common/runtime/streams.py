"""Handles standard streams that cannot be used: closed (`>&-`), without a reader (`| head`), or on a full disk.

Imports nothing slow: programs call `reopen_closed` before they import anything that opens files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from common.errors import TrainingFailure

_NAMES = ("stdin", "stdout", "stderr")  # in the order of their file descriptors

closed: set[str] = set()  # names of the streams that were closed when the program began


def reopen_closed() -> None:
    """Connect closed standard streams to /dev/null. A second call does nothing.

    Call it before any file is opened. A file would get the free descriptor, and the output of libraries would go
    into that file.
    """
    for descriptor, name in enumerate(_NAMES):
        if getattr(sys, name) is not None:
            continue
        closed.add(name)
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)
        setattr(sys, name, open(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False))


class ReaderLeft(Exception):
    """The reader of standard output has closed its end of the pipe."""


class _Stream:
    """A text stream that handles errors of `write` and `flush` in `_on_error`."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Like `TextIO.write`."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self._on_error(error)
            return len(text)

    def flush(self) -> None:
        """Like `TextIO.flush`."""
        try:
            self.stream.flush()
        except OSError as error:
            self._on_error(error)

    def _on_error(self, error: OSError) -> None:
        """Send all further output to /dev/null, including what Python flushes when it exits."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class TolerantStream(_Stream):
    """Standard output or error whose write errors do not end the run.

    At Ctrl-C the `tee` of `| tee log` ends before the run has saved its checkpoint.
    """

    def _on_error(self, error: OSError) -> None:
        super()._on_error(error)
        if error.errno != errno.EPIPE and self is not sys.stderr:  # a reader that left wants no warning
            print(
                f"warning: standard output cannot be written: {error.strerror}: the rest of it is lost",
                file=sys.stderr,
                flush=True,
            )


class _RequiredStream(_Stream):
    """Standard output that carries the program's result: a write error ends the program's work."""

    def _on_error(self, error: OSError) -> None:
        super()._on_error(error)
        if error.errno == errno.EPIPE:
            raise ReaderLeft from None
        raise TrainingFailure(f"standard output cannot be written: {error.strerror}") from None


def tolerate_write_errors() -> None:
    """Let the program go on when standard output or error cannot be written. A second call does nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, TolerantStream):
            setattr(sys, name, TolerantStream(stream))


@contextlib.contextmanager
def until_reader_leaves() -> Iterator[None]:
    """Within the context, end the work without an error as soon as the reader of standard output leaves.

    Raises:
        TrainingFailure: standard output is closed, or cannot be written.
    """
    if "stdout" in closed:
        raise TrainingFailure("standard output, where the answers go, is closed: open it, or give a file to write to")
    previous = sys.stdout
    sys.stdout = cast(TextIO, _RequiredStream(previous.stream if isinstance(previous, TolerantStream) else previous))
    try:
        yield
        sys.stdout.flush()
    except ReaderLeft:
        pass
    finally:
        sys.stdout = previous
