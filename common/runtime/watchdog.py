"""Runs a thread on every rank that ends its process when the launcher has ended or the other ranks cannot continue.

DeepSpeed's launcher is two processes, `deepspeed` and `deepspeed.launcher.launch`. When one is killed, or `deepspeed`
gets a signal, nothing tells the ranks. So every rank checks whether both still run. A shell above them may end.

When a rank is killed, the launcher ends the others, but on a loaded machine that may take it a minute. Once there is a
process group, `heartbeat.Peers` watches the other ranks. Before that, a rank watches the processes that the same
launcher has started.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

import psutil

from common.runtime import signals
from common.runtime.heartbeat import INTERVAL, Peers, is_running

if TYPE_CHECKING:  # torch is slow to import, and the watchdog starts before it
    from torch.distributed import Store

GRACE = 25.0  # seconds that ranks have for a last checkpoint after their launcher has gone
# Seconds that the launcher has to end this rank after another rank has ended, before there is a process group.
PATIENCE = 10.0

_LAUNCHERS = {"deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}

_thread: threading.Thread | None = None
_attached = False  # whether there is or was a process group
_peers: Peers | None = None


def start() -> None:
    """Catch signals and watch the launcher. Call it before slow imports; a second call does nothing."""
    global _thread
    if _thread is None:
        signals.catch_signals()
        _thread = threading.Thread(target=_watch, args=(launchers(),), daemon=True)
        _thread.start()


def attach(store: Store, rank: int, world_size: int, timeout: int) -> None:
    """Watch the other ranks of a process group too. A second call only sets the timeout, in seconds."""
    global _peers, _attached
    _attached = True
    if _peers is not None:
        _peers.timeout = timeout
    elif world_size > 1:
        _peers = Peers(store, rank, world_size, timeout)


def peers() -> Peers | None:
    """The other ranks; None before `attach`, after `detach`, and if there is only one rank."""
    return _peers


def detach() -> None:
    """Stop watching the other ranks: this rank has done its work."""
    global _peers
    if _peers is not None:
        _peers.stop()
        _peers = None


def launchers() -> list[psutil.Process]:
    """DeepSpeed's launcher processes above this one, nearest first."""
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
        if deadline is None and not all(map(is_running, launchers)):
            deadline = time.monotonic() + GRACE
            signals.request_stop("the end of its launcher")
        if deadline is not None and time.monotonic() > deadline:
            signals.end_at_once(
                f"the launcher has gone and no checkpoint could be saved in {GRACE:.0f} seconds: the "
                "same command goes on from the last one"
            )
        if (peers := _peers) is not None:
            peers.check(launcher_gone=deadline is not None)
        elif not _attached:
            siblings.check()


class _Siblings:
    """The ranks that the same launcher has started, before there is a process group.

    Args:
        launcher: the parent of these ranks; None without a launcher.
    """

    def __init__(self, launcher: psutil.Process | None):
        self._launcher = launcher
        self._ended_since: float | None = None

    def check(self) -> None:
        """End this process if another rank has ended and the launcher has not reacted for `PATIENCE` seconds."""
        ranks: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):  # the launcher has gone, which `_watch` sees too
            ranks = self._launcher.children() if self._launcher else []
        running = [process.pid for process in ranks if is_running(process)]
        if len(running) == len(ranks):  # a rank whose end the launcher has noticed is no longer among its children
            self._ended_since = None
            return
        self._ended_since = self._ended_since or time.monotonic()
        if time.monotonic() - self._ended_since > PATIENCE:
            if os.getpid() == min(running):
                signals.write_stderr(
                    "error: another rank has ended without a word while the programs started (killed, "
                    "perhaps for want of memory)",
                    on_every_rank=True,
                )
            os._exit(1)
