"""Being told to stop: by SIGTERM, by SIGINT (Ctrl-C), or because the launcher has gone.

Before training begins that ends the program at once. From then on it is only noted; the training loop asks, saves a
checkpoint with all ranks together, and ends by `Stopped`. Nothing slow is imported here: signals are caught from the
first second.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

from common.runtime.streams import outlast_readers

STOPPED = 75  # exit code of a run that was told to stop; sysexits.h: a temporary failure, try again
ONE_SIGNAL = 5.0  # seconds within which signals count as one: Ctrl-C reaches a rank from the terminal and the launcher
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_reason: str | None = None
_first_signal: float | None = None
_training = False


class Stopped(Exception):
    """The run ends because it was told to, raised on all ranks alike; its state is saved. The message is one line."""


def catch_signals() -> None:
    """From here on SIGTERM and SIGINT tell the run to stop.

    Python runs its handlers between two steps of the main thread, and so never while that waits in a library for a
    rank that is gone. So the signals' numbers go through a pipe to a thread.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # what a child is told is not for this rank
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: None)
    threading.Thread(target=_listen, args=(reading,), daemon=True).start()
    outlast_readers()


def ignore_signals() -> None:
    """For a run that is ending: the launcher, seeing the first rank end, signals those that are a moment behind."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def mark_training_started() -> None:
    """From here on there is something to save."""
    global _training
    _training = True


def training_started() -> bool:
    """Whether training has begun on this rank."""
    return _training


def stop_requested() -> str | None:
    """What told this rank to stop, if anything has; other ranks may not know it yet."""
    return _reason


def request_stop(reason: str) -> None:
    """Tell this rank to stop."""
    global _reason
    if not _training:
        end_at_once(f"stopped by {reason} before training began")
    if _reason is None:
        _reason = reason
        write(
            f"{reason}: stopping as soon as a checkpoint can be saved; a signal after {ONE_SIGNAL:.0f} seconds ends "
            "the run at once"
        )


def end_at_once(message: str, code: int = STOPPED) -> None:
    """End this process from whichever thread; `message` is said by rank 0."""
    write(message)
    os._exit(code)


def write(message: str, on_every_rank: bool = False) -> None:
    """A line on stderr from rank 0, in a way that any thread may use."""
    if on_every_rank or os.environ.get("RANK", "0") == "0":
        try:
            os.write(2, f"\n{message}\n".encode())
        except OSError:
            pass  # nobody is there to read it


def _listen(pipe: int) -> None:
    while True:
        select.select([pipe], [], [])
        time.sleep(0.1)  # Ctrl-C makes the launcher send SIGTERM at once; the lower number, SIGINT, is what happened
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
