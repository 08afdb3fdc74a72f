"""Writes the files of one rank into a checkpoint, and hashes each file while it is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol


class Writable(Protocol):
    """The part of a binary file that the writers of shards use."""

    def write(self, data: bytes, /) -> int:
        """Write all of `data`, which is any bytes-like object. Returns the number of bytes."""

    def flush(self) -> None:
        """Does what `flush` of a file does."""


@dataclass
class Shards:
    """The files that this rank writes into the directory of a checkpoint.

    Disk errors are recorded and not raised: ranks wait for each other while they save, so no rank may leave early.

    Attributes:
        files: size and SHA-256 of each file, by its path inside the directory.
        needed: bytes of all files, including those that could not be written.
        refusal: why the first refused file could not be written; None if none was refused.
    """

    directory: Path
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    needed: int = 0
    refusal: str | None = None

    def add(self, name: str, write: Callable[[Writable], object]) -> None:
        """Write a file.

        Args:
            write: is called with the file. The file's methods do not raise if the disk fails.
        """
        with _Shard(self, self.directory / name) as shard:
            write(shard)
        self.needed += shard.size
        if self.refusal is None:
            self.files[name] = shard.size, shard.digest.hexdigest()

    def attempt(self, action: Callable[[], object]) -> None:
        """Run `action` and record its OSError, unless an earlier one is recorded already."""
        if self.refusal is not None:
            return
        try:
            action()
        except OSError as error:
            self.refusal = error.strerror or str(error)


class _Shard:
    """A file that is hashed while it is written. After a disk error, further bytes are only counted."""

    def __init__(self, shards: Shards, path: Path):
        self.size, self.digest = 0, hashlib.sha256()
        self._shards, self._path = shards, path
        self._file: BinaryIO | None = None

    def __enter__(self) -> _Shard:
        self._shards.attempt(self._open)
        return self

    def write(self, data: bytes, /) -> int:
        size = memoryview(data).nbytes
        self.size += size
        self._shards.attempt(lambda: self._append(data))
        return size

    def flush(self) -> None:
        """Does nothing: the file is flushed once, when it is complete."""

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            file = self._file
            self._shards.attempt(lambda: _bring_to_disk(file))
            with contextlib.suppress(
                OSError
            ):  # closing writes buffered bytes again, which the disk has refused already
                file.close()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "wb")

    def _append(self, data: bytes) -> None:
        if self._file is not None:  # it is open, or the disk has refused and nothing is attempted
            self._file.write(data)
            self.digest.update(data)


def _bring_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
