"""Standard streams that are closed (`>&-`), whose reader has gone (`| head`) or whose disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from common.errors import TrainingFailure

_NAMES = ("stdin", "stdout", "stderr")  # by their numbers

closed: set[str] = set()  # names of those that were closed when the program began


def open_closed() -> None:
    """Put what leads nowhere in the place of standard streams that are closed; a second call does nothing.

    To be called before any file is opened: that would get the free number, and what libraries print would go into it.
    """
    for number, name in enumerate(_NAMES):
        if getattr(sys, name) is not None:
            continue
        closed.add(name)
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        os.set_inheritable(number, True)
        setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))


class ReaderLeft(Exception):
    """Nobody reads standard output any more."""


class _Stream:
    """A text stream that does something of its own where the system refuses to write."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        """As of any text stream."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self._refused(error)
            return len(text)

    def flush(self) -> None:
        """As of any text stream."""
        try:
            self.stream.flush()
        except OSError as error:
            self._refused(error)

    def _refused(self, error: OSError) -> None:
        """From here on what is written goes nowhere, also that which Python flushes at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class LastingStream(_Stream):
    """Standard output or error that outlives its reader: `| tee log` ends at Ctrl-C, before the run has saved."""

    def _refused(self, error: OSError) -> None:
        super()._refused(error)
        if error.errno != errno.EPIPE and self is not sys.stderr:  # a reader that leaves has seen enough
            print(
                f"warning: standard output cannot be written: {error.strerror}: the rest of it is lost",
                file=sys.stderr,
                flush=True,
            )


class _WantedStream(_Stream):
    """Standard output that the program's work is for."""

    def _refused(self, error: OSError) -> None:
        super()._refused(error)
        if error.errno == errno.EPIPE:
            raise ReaderLeft from None
        raise TrainingFailure(f"standard output cannot be written: {error.strerror}") from None


def outlast_readers() -> None:
    """From here on standard output and error outlive whoever reads them."""
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, LastingStream) else LastingStream(stream) for stream in (sys.stdout, sys.stderr)
    )


@contextlib.contextmanager
def until_reader_leaves() -> Iterator[None]:
    """Within the context the program's work ends, well, as soon as nobody reads standard output any more.

    Raises:
        TrainingFailure: standard output is closed, or cannot be written.
    """
    if "stdout" in closed:
        raise TrainingFailure("standard output, where the answers go, is closed: open it, or give a file to write to")
    usual = sys.stdout
    sys.stdout = _WantedStream(usual.stream if isinstance(usual, LastingStream) else usual)
    try:
        yield
        sys.stdout.flush()
    except ReaderLeft:
        pass
    finally:
        sys.stdout = usual
