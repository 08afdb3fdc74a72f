"""Locks an output directory, so that only one run at a time uses it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from common.errors import InputError

FILE = "logs/run.lock"

_open_locks: list[TextIO] = []  # a lock is released when its file is closed


def lock_output(directory: Path) -> None:
    """Reserve an existing directory for this process until the process ends.

    The operating system releases the lock when the process ends, however it ends, on NFS too. On a file system without
    locks, nothing is locked.

    Raises:
        InputError: another run has locked it; the message names that run.
    """
    path = directory / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise InputError(
            directory, f"it is in use by {owner}: wait until that run has ended, or choose another directory"
        ) from None
    except OSError:
        pass
    _open_locks.append(file)
    with contextlib.suppress(OSError):  # the disk may be full; the lock is held in any case
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
