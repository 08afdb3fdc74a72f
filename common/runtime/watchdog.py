"""A thread of every rank that ends it when nobody waits for it any more, or when the others cannot go on.

DeepSpeed's launcher is two processes, `deepspeed` and `deepspeed.launcher.launch`. When one is killed, or `deepspeed`
gets a signal, the ranks are not told. So every rank looks whether both are still there. A shell above them may go.

When a rank is killed the launcher ends the others. On a loaded machine it may take a minute to act, and until they have
a process group the ranks do not watch each other: so a rank looks after those that the same launcher has started.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

import psutil

from common.runtime import signals
from common.runtime.heartbeat import INTERVAL, Peers, lives

GRACE = 25.0  # seconds that ranks whose launcher has gone have for a last checkpoint

PATIENCE = 10.0  # seconds that the launcher has to end a rank whose sibling has ended before there is a process group

_LAUNCHERS = {"deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}

_thread: threading.Thread | None = None
_met = False  # whether there is, or was, a process group
_peers: Peers | None = None


def start() -> None:
    """Catch signals and watch the launcher, from before the slow imports on; a second call does nothing."""
    global _thread
    if _thread is None:
        signals.catch_signals()
        _thread = threading.Thread(target=_watch, args=(launchers(),), daemon=True)
        _thread.start()


def attach(store, rank: int, ranks: int, timeout: int) -> None:
    """Watch the other ranks of a process group too; a second call sets the timeout, in seconds."""
    global _peers, _met
    _met = True
    if _peers is not None:
        _peers.timeout = timeout
    elif ranks > 1:
        _peers = Peers(store, rank, ranks, timeout)


def peers() -> Peers | None:
    """The other ranks, once there are any."""
    return _peers


def detach() -> None:
    """Watch the other ranks no longer, because this one has done its work."""
    global _peers
    if _peers is not None:
        _peers.leave()
        _peers = None


def launchers() -> list[psutil.Process]:
    """DeepSpeed's processes above this one."""
    return [process for process in psutil.Process().parents() if _is_launcher(process)]


def _is_launcher(process: psutil.Process) -> bool:
    try:
        interpreter, *words = map(os.path.basename, process.cmdline()[:4])
    except (psutil.Error, ValueError):
        return False
    return interpreter.startswith("python") and not _LAUNCHERS.isdisjoint(words)


def _watch(launchers: list[psutil.Process]) -> None:
    deadline = None
    siblings = _Siblings(launchers[0] if launchers else None)
    if not launchers and "LOCAL_SIZE" in os.environ and os.getppid() == 1:
        signals.end_at_once("the launcher has gone before the program began")
    while True:
        time.sleep(INTERVAL)
        if deadline is None and not all(map(lives, launchers)):
            deadline = time.monotonic() + GRACE
            signals.request_stop("the end of its launcher")
        if deadline is not None and time.monotonic() > deadline:
            signals.end_at_once(
                f"the launcher has gone and no checkpoint could be saved in {GRACE:.0f} seconds: the "
                "same command goes on from the last one"
            )
        if (others := _peers) is not None:
            others.look(launcher_gone=deadline is not None)
        elif not _met:
            siblings.look()


class _Siblings:
    """The ranks that the same launcher has started, while there is no process group.

    Args:
        launcher: the parent of all; None where there is none.
    """

    def __init__(self, launcher: psutil.Process | None):
        self._launcher = launcher
        self._missing_since: float | None = None

    def look(self) -> None:
        """End this process if one of the others has ended and the launcher does not even notice."""
        ranks: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):  # the launcher has gone, which `_watch` sees too
            ranks = self._launcher.children() if self._launcher else []
        living = [process.pid for process in ranks if lives(process)]
        if len(living) == len(ranks):  # one that the launcher has taken note of is no child of it any more
            self._missing_since = None
            return
        self._missing_since = self._missing_since or time.monotonic()
        if time.monotonic() - self._missing_since > PATIENCE:
            if os.getpid() == min(living):
                signals.write(
                    "error: another rank has ended without a word while the programs started (killed, "
                    "perhaps for want of memory)",
                    on_every_rank=True,
                )
            os._exit(1)
