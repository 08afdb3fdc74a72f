"""One run at a time in an output directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from common.errors import UserError

FILE = "logs/run.lock"

_held: list[TextIO] = []  # open files keep their locks to the end of the process


def lock_output(directory: Path) -> None:
    """Take an existing directory for this process, for the rest of its life.

    The system drops the lock with the process, however that ends, so that a dead owner holds none; over NFS too. Where
    a file system has no locks, none is taken.

    Raises:
        UserError: another run has it; the message names that run.
    """
    path = directory / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise UserError(
            f"--output_dir {directory} is in use by {owner}: wait until that run has ended, or choose another directory"
        ) from None
    except OSError:
        pass
    _held.append(file)
    with contextlib.suppress(OSError):  # of a full disk; the lock holds
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
