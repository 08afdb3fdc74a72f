"""Handles requests to stop the run: SIGTERM, SIGINT (Ctrl-C), or a launcher that has ended.

Before training starts, a request ends the program at once. After that it is only recorded. The training loop asks for
it, saves a checkpoint with all ranks together, and raises `Stopped`. This module imports nothing slow, so that signals
are caught from the first second.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

from common.runtime.streams import tolerate_write_errors

STOPPED = 75  # exit code of a run that was asked to stop; in sysexits.h a temporary failure: try again
# Seconds within which signals count as one. At Ctrl-C a rank gets a signal from the terminal and one from the launcher.
ONE_SIGNAL = 5.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_stop_reason: str | None = None
_first_signal: float | None = None  # time.monotonic()
_training_started = False


class Stopped(Exception):
    """The run was asked to stop and has saved its state. All ranks raise it. The message is one line."""


def catch_signals() -> None:
    """Make SIGTERM and SIGINT request a stop.

    Python runs signal handlers in the main thread, between two bytecode instructions. While the main thread waits in
    a library for a rank that is gone, they never run. So the signal numbers go through a pipe to a thread.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not this rank's
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: None)
    threading.Thread(target=_listen, args=(reading,), daemon=True).start()
    tolerate_write_errors()


def ignore_signals() -> None:
    """Ignore SIGTERM and SIGINT while the run ends.

    When the first rank ends, the launcher sends signals to the ranks that need a moment longer.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def mark_training_started() -> None:
    """From here on there is a state to save, and a request to stop waits for the training loop."""
    global _training_started
    _training_started = True


def training_started() -> bool:
    """Whether this rank has called `mark_training_started`."""
    return _training_started


def stop_requested() -> str | None:
    """The reason why this rank was asked to stop; None if it was not. Other ranks may not know it yet."""
    return _stop_reason


def request_stop(reason: str) -> None:
    """Ask this rank to stop. Before training starts, end the process at once.

    Args:
        reason: a signal's name or a noun phrase; it begins the message.
    """
    global _stop_reason
    if not _training_started:
        end_at_once(f"stopped by {reason} before training began")
    if _stop_reason is None:
        _stop_reason = reason
        write_stderr(
            f"{reason}: stopping as soon as a checkpoint can be saved; a signal after {ONE_SIGNAL:.0f} seconds ends "
            "the run at once"
        )


def end_at_once(message: str, code: int = STOPPED) -> None:
    """End this process from any thread; rank 0 prints `message`."""
    write_stderr(message)
    os._exit(code)


def write_stderr(message: str, on_every_rank: bool = False) -> None:
    """Write a line to stderr from rank 0, or from every rank. Any thread may call it."""
    if on_every_rank or os.environ.get("RANK", "0") == "0":
        try:
            os.write(2, f"\n{message}\n".encode())
        except OSError:
            pass  # the reader of stderr has gone


def _listen(pipe: int) -> None:
    while True:
        select.select([pipe], [], [])
        # At Ctrl-C the launcher also sends SIGTERM at once. Wait for both and report SIGINT, the lower number.
        time.sleep(0.1)
        for number in sorted(os.read(pipe, 64)):
            if number in _SIGNALS:
                _on_signal(number)


def _on_signal(number: int) -> None:
    global _first_signal
    name = signal.Signals(number).name
    if _first_signal is None:
        _first_signal = time.monotonic()
    elif time.monotonic() - _first_signal > ONE_SIGNAL:
        end_at_once(f"ended at once by a second signal, {name}: the same command goes on from the last checkpoint")
    request_stop(name)
