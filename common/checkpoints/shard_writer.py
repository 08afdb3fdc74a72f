"""The files that one rank writes into a checkpoint, each hashed on its way to the disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO


@dataclass
class Shards:
    """What this rank writes into the directory of a checkpoint.

    A disk that refuses is noted and not raised: ranks wait for each other while they save, so none may leave early.

    Attributes:
        files: size and SHA-256 of each, by its path inside the directory.
        needed: bytes of all of them, also of those that the disk has refused.
        refusal: why the first of them could not be written.
    """

    directory: Path
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    needed: int = 0
    refusal: str | None = None

    def add(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file.

        Args:
            write: gets what stands for the file; it has `write` and `flush` and raises nothing.
        """
        with _Shard(self, self.directory / name) as shard:
            write(shard)
        self.needed += shard.size
        if self.refusal is None:
            self.files[name] = shard.size, shard.digest.hexdigest()

    def attempt(self, action: Callable[[], object]) -> None:
        """Do what the disk may refuse; nothing if it has refused already."""
        if self.refusal is not None:
            return
        try:
            action()
        except OSError as error:
            self.refusal = error.strerror or str(error)


class _Shard:
    """A file that is hashed while it is written. Once the disk has refused, what follows is only counted."""

    def __init__(self, shards: Shards, path: Path):
        self.size, self.digest = 0, hashlib.sha256()
        self._shards, self._path, self._file = shards, path, None

    def __enter__(self):
        self._shards.attempt(self._open)
        return self

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        self.size += size
        self._shards.attempt(lambda: self._take(data))
        return size

    def flush(self) -> None:
        """All is brought to the disk at the end."""

    def __exit__(self, *error) -> None:
        if self._file is not None:
            self._shards.attempt(self._bring_to_disk)
            with contextlib.suppress(OSError):  # once more what the disk has refused
                self._file.close()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "wb")

    def _take(self, data) -> None:
        self._file.write(data)
        self.digest.update(data)

    def _bring_to_disk(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
