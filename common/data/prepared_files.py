"""Seals prepared files when they are written, and verifies their sizes and checksums when they are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import xxhash

from common.formats import other_format

# Raise it whenever the same sources, options, tokenizer and template give other prepared rows, another split or other
# files than before: what was prepared in an older format is then prepared anew, and a run does not resume over it.
# A change of code that leaves the rows as they are leaves it as it is.
FORMAT = 1

READY = "READY"  # the file that is written last: a directory that has it is complete
_LARGE = 10 * 2**30  # bytes that may take more than some seconds to read
_A_DAY = 24 * 3600
_VERIFIED = "VERIFIED"  # prefix of files that say which launch has verified the directory, and in which state


class Damaged(ValueError):
    """What is wrong with a directory, in a few words."""


class OtherFormat(ValueError):
    """A directory that is not of this version's `FORMAT`; the message says of which."""


def seal(directory: Path, report: str) -> None:
    """Write `READY` into a directory: its format, the sizes and checksums of its files, and a report (JSON)."""
    files = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(directory.iterdir())}
    content = json.dumps({"format": FORMAT, "files": files, "report": json.loads(report)}, indent=2)
    (directory / READY).write_text(f"{_text_checksum(content)}\n{content}\n", encoding="utf-8")


def unseal(directory: Path) -> str:
    """The report of a directory whose files are as they were when it was sealed.

    Reads all bytes, some GB a second if the disk is as fast. Of the ranks that one launcher starts on a machine, the
    first does it for all.

    Raises:
        Damaged: a file is missing or has changed.
        OtherFormat: it was written by another version of this module.
    """
    try:
        checksum, content = (directory / READY).read_text(encoding="utf-8").split("\n", 1)
        content = content.removesuffix("\n")
        if checksum != _text_checksum(content):
            raise Damaged(f"{READY} has changed")
        values = json.loads(content)
        if other := other_format(values, FORMAT):
            raise OtherFormat(other)
        paths = {directory / name: tuple(written) for name, written in values["files"].items()}
        if not _verified(directory, paths):
            if (total := sum(size for size, _ in paths.values())) > _LARGE:
                print(f"{directory}: {total / 2**30:,.0f} GiB are read to see that they are whole", flush=True)
            for path, (size, checksum) in paths.items():
                if path.stat().st_size != size:
                    raise Damaged(f"{path.name} has {path.stat().st_size:,} bytes, not {size:,}")
                if _checksum(path) != checksum:
                    raise Damaged(f"{path.name} has changed")
            _note_verified(directory, paths)
        return json.dumps(values["report"])
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (Damaged, OtherFormat):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"it cannot be read ({error})") from None


def _checksum(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def _text_checksum(text: str) -> str:
    return xxhash.xxh3_128(text.encode("utf-8")).hexdigest()


def _verified(directory: Path, paths: Iterable[Path]) -> bool:
    """Whether another rank of this launch has verified the files, and they have not changed since."""
    launch = _launch()
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return launch is not None and json.loads(_note_of(directory, launch).read_text()) == [launch, _state(paths)]
    return False


def _note_verified(directory: Path, paths: Iterable[Path]) -> None:
    if (launch := _launch()) is not None:
        with contextlib.suppress(OSError):  # the directory may be read-only
            for old in directory.glob(f"{_VERIFIED}-*"):
                if old.stat().st_mtime < time.time() - _A_DAY:
                    old.unlink(missing_ok=True)
            _note_of(directory, launch).write_text(json.dumps([launch, _state(paths)]))


def _note_of(directory: Path, launch: list) -> Path:
    """The file in which a launch notes what it has verified; several launches may use the directory at a time."""
    return directory / f"{_VERIFIED}-{_text_checksum(json.dumps(launch))}"


def _launch() -> list | None:
    """What identifies the launcher that started the ranks on this machine; None for a single rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    try:
        launcher = psutil.Process(os.getppid())
        return [socket.gethostname(), launcher.pid, launcher.create_time()]
    except psutil.Error:
        return None


def _state(paths: Iterable[Path]) -> list:
    stats = [path.stat() for path in paths]
    return [[stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for stat in stats]
