"""A thread of every rank that ends it when nobody waits for it any more, or when the others cannot go on.

DeepSpeed's launcher is two processes, `deepspeed` and `deepspeed.launcher.launch`. When one is killed, or `deepspeed`
gets a signal, the ranks are not told. So every rank looks whether both are still there. A shell above them may go.
"""
from __future__ import annotations

import os
import threading
import time

import psutil

from common import stopping
from common.peers import INTERVAL, Peers, lives

GRACE = 25.0  # seconds that ranks whose launcher has gone have for a last checkpoint

_LAUNCHERS = {"deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}

_thread: threading.Thread | None = None
_peers: Peers | None = None


def begin() -> None:
    """Catch signals and watch the launcher, from before the slow imports on; a second call does nothing."""
    global _thread
    if _thread is None:
        stopping.catch_signals()
        _thread = threading.Thread(target=_watch, args=(launchers(),), daemon=True)
        _thread.start()


def join(store, rank: int, ranks: int, timeout: int) -> None:
    """Watch the other ranks of a process group too; a second call sets the timeout, in seconds."""
    global _peers
    if _peers is not None:
        _peers.timeout = timeout
    elif ranks > 1:
        _peers = Peers(store, rank, ranks, timeout)


def peers() -> Peers | None:
    """The other ranks, once there are any."""
    return _peers


def leave() -> None:
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
    while True:
        time.sleep(INTERVAL)
        if deadline is None and not all(map(lives, launchers)):
            deadline = time.monotonic() + GRACE
            stopping.tell("the end of its launcher")
        if deadline is not None and time.monotonic() > deadline:
            stopping.end_at_once(f"the launcher has gone and no checkpoint could be saved in {GRACE:.0f} seconds: the "
                                 "same command goes on from the last one")
        if (others := _peers) is not None:
            others.look(launcher_gone=deadline is not None)
