"""Locks a directory shared by ranks and programs, for one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_PATIENCE = 10  # seconds until a rank says what it waits for


@contextlib.contextmanager
def locked(path: Path, awaited: str) -> Iterator[bool]:
    """Within the context this process alone holds the lock; yields whether it may write into the lock's directory.

    Where it may not write, nothing can change there, and reading needs no lock: except that a lock file of a colleague
    who may write is waited for all the same.

    Args:
        path: the lock file.
        awaited: what a process that waits for long says it is waiting for.
    """
    lock, writable = FileLock(path), True
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        print(f"local rank {os.environ.get('LOCAL_RANK', '0')}: waiting for {awaited}", flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        writable = False
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        if not writable and path.is_file():
            with contextlib.suppress(OSError):
                stream = stack.enter_context(open(path, "rb"))
                fcntl.flock(stream, fcntl.LOCK_EX)
                writable = os.access(path.parent, os.W_OK)
        yield writable
