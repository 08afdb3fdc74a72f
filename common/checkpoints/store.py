"""Stores checkpoints on disk so that each is complete and undamaged ("whole"), or does not exist.

All ranks write their files into a temporary directory; each file is hashed while it is written and then brought to the
disk. A manifest lists them. Only then a rename gives the directory its name, and a pointer, replaced atomically, says
that it is the newest. Older checkpoints are deleted last. So wherever a save is interrupted, the newest whole
checkpoint is found again, and a damaged one is recognised.

All methods are called by all ranks together unless they say otherwise; the directory is one that every rank sees.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from common.checkpoints.errors import CheckpointError
from common.checkpoints.shard_writer import Shards
from common.runtime.distributed import barrier, gather_objects, is_main, rank, world_size

MANIFEST = "manifest.json"
POINTER = "newest"
PARTIAL = ".partial"
_BLOCK = 1 << 20


class NotSaved(Exception):
    """A checkpoint could not be written; earlier ones are as they were. Raised on all ranks alike."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: holds a directory step-N for each checkpoint.
        keep: how many of the newest stay, once a step has succeeded after the newest.
        further_problems: returns what else is wrong with a checkpoint whose files are undamaged; called on rank 0.
    """

    def __init__(
        self, directory: str | Path, keep: int, further_problems: Callable[[Path], list[str]] = lambda path: []
    ):
        self.directory, self.keep, self.further_problems = Path(directory), keep, further_problems

    def save(self, step: int, write: Callable[[Shards], None]) -> Path:
        """Publish the files that `write`, called on every rank, adds to this rank's shards.

        Raises:
            NotSaved: a file could not be written; the message names the path and the bytes needed.
        """
        if is_main():
            self._sweep()
        # A unique name: a directory that cannot be removed (NFS keeps files that a hung process holds open) blocks no
        # later save.
        partial = self.directory / f"{PARTIAL}-{step}-{gather_objects(uuid.uuid4().hex[:8])[0]}"
        final = self.directory / f"step-{step}"
        shards = Shards(partial)
        write(shards)
        written = self._gather_or_raise(shards)
        if is_main():
            shards.attempt(lambda: self._publish(written, final))
        self._gather_or_raise(shards)
        if is_main():
            # No step has succeeded after the new one yet: until `prune` is called, the one before stays too.
            self._retire(final, max(self.keep, 2))
        return final

    def newest_whole(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is whole, or None; `say` is called with a warning about each that is not.

        Raises:
            CheckpointError: see `problems`.
        """
        for path in self._by_age():
            problems = self.problems(path)
            if not problems:
                return path
            say(f"warning: checkpoint {path} is not whole ({'; '.join(problems[:3])}): looking for the one before")
        return None

    def problems(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint: files that are missing, have another size or content, or cannot be used.
        Empty if it is whole.

        Raises:
            CheckpointError: on all ranks alike, if a file cannot be read because of the disk: its content may be
                undamaged.
        """
        refused: list[str] = []
        try:
            files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
            expected = sorted((str(name), int(size), str(digest)) for name, (size, digest) in files.items())
            problems = [] if expected else [f"{MANIFEST} lists no files"]
        except OSError as error:
            expected, problems = [], _unread(MANIFEST, error, refused)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            expected, problems = [], [f"{MANIFEST} cannot be read: {error}"]
        for name, size, digest in expected[rank() :: world_size()]:
            problems += _problem(path / name, name, size, digest, refused)
        everyone = gather_objects((problems, refused))
        for _, refusals in everyone:
            if refusals:
                raise CheckpointError(path, f"it cannot be read: {refusals[0]}", cure="see to the disk and start again")
        problems = sorted({problem for of_rank, _ in everyone for problem in of_rank})
        return problems or gather_objects(self.further_problems(path) if is_main() else [])[0]

    def scratch(self) -> Path:
        """The path of a directory for temporary files; `clean` and the next save remove it. It does not exist yet."""
        return self.directory / f"{PARTIAL}-scratch"

    def prune(self, newest: Path) -> None:
        """Remove checkpoints beyond `keep`, after a step has succeeded from `newest`."""
        if is_main():
            self._retire(newest, self.keep)

    def newest_before(self, step: int) -> Path | None:
        """The newest checkpoint from before `step`, without checking it. One rank may call this alone."""
        paths = [path for path in self.directory.glob("step-*") if -1 < _step(path) < step]
        return max(paths, key=_step, default=None)

    def clean(self) -> None:
        """Remove the files of an interrupted save, and those in `scratch`."""
        if is_main():
            self._sweep()
        barrier()

    def delete(self) -> None:
        """Remove all checkpoints."""
        if is_main():
            with contextlib.suppress(OSError):
                for path in self.directory.glob("step-*"):
                    self._put_aside(path)
            shutil.rmtree(self.directory, ignore_errors=True)
        barrier()

    def _by_age(self) -> list[Path]:
        """Finished checkpoints: the one that the pointer names, then the others, newest first. Same on all ranks."""
        paths = (
            {
                path.name: path
                for path in self.directory.glob("step-*")
                if path.is_dir() and path.name.removeprefix("step-").isdecimal()
            }
            if is_main()
            else {}
        )
        names = sorted(paths, key=lambda name: -int(name.removeprefix("step-")))
        try:
            pointed = (self.directory / POINTER).read_text(encoding="utf-8").strip() if is_main() else ""
        except (OSError, ValueError):
            pointed = ""
        names = gather_objects(sorted(names, key=lambda name: name != pointed))[0]
        return [self.directory / name for name in names]

    def _gather_or_raise(self, shards: Shards) -> list[Shards]:
        """The shards of every rank. If one could not be written, the files are removed and all ranks raise NotSaved."""
        everyone = gather_objects(shards)
        refused = next(((number, other.refusal) for number, other in enumerate(everyone) if other.refusal), None)
        if refused is not None:
            if is_main():
                shutil.rmtree(shards.directory, ignore_errors=True)
            number, reason = refused
            raise NotSaved(
                f"no checkpoint could be written to {self.directory}, which takes "
                f"{sum(other.needed for other in everyone):,} bytes: {reason} (rank {number}): free space "
                "there, or make it writable"
            )
        return everyone

    def _publish(self, written: list[Shards], final: Path) -> None:
        partial, files = written[0].directory, {}
        for number, shards in enumerate(written):
            for name, (size, digest) in shards.files.items():
                if not (partial / name).is_file() or (partial / name).stat().st_size != size:
                    raise OSError(
                        f"rank 0 does not see {name} as rank {number} has written it: every machine must see "
                        "the same directory"
                    )
                files[name] = size, digest
        _write_durably(partial / MANIFEST, json.dumps({"files": files}, indent=1))
        for directory in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
            _sync(directory)
        if final.exists():  # a damaged one, or one of a run that went on from an earlier checkpoint
            self._put_aside(final)
        os.rename(partial, final)
        _sync(self.directory)
        _sync(self.directory.parent)
        _write_durably(self.directory / f"{POINTER}.new", final.name)
        os.replace(self.directory / f"{POINTER}.new", self.directory / POINTER)
        _sync(self.directory)

    def _retire(self, newest: Path, keep: int) -> None:
        """Delete checkpoints that are too old, and those of later steps, which are damaged, or were made before the run
        was resumed from an earlier one."""
        steps = sorted(map(_step, self.directory.glob("step-*")))
        older = [step for step in steps if 0 <= step < _step(newest)]
        retained = {_step(newest), *older[max(0, len(older) - keep + 1) :]}
        for step in set(steps) - retained - {-1}:
            with contextlib.suppress(OSError):
                self._put_aside(self.directory / f"step-{step}")
        self._sweep()

    def _put_aside(self, path: Path) -> None:
        """Rename a checkpoint before it is deleted, so that an interrupted deletion leaves no partial checkpoint."""
        os.rename(path, path.with_name(f"{PARTIAL}-{path.name}-{uuid.uuid4().hex[:8]}"))

    def _sweep(self) -> None:
        for partial in self.directory.glob(f"{PARTIAL}-*"):
            shutil.rmtree(partial, ignore_errors=True)


def _step(path: Path) -> int:
    name = path.name.removeprefix("step-")
    return int(name) if name.isdecimal() else -1


def _problem(path: Path, name: str, size: int, digest: str, refused: list[str]) -> list[str]:
    try:
        if path.stat().st_size != size:
            return [f"{name} has {path.stat().st_size:,} bytes, not {size:,}"]
        return [] if _sha256(path) == digest else [f"{name} has other content than was written"]
    except OSError as error:
        return _unread(name, error, refused)
    except ValueError as error:  # a name with a NUL
        return [f"{name!r}: {error}"]


def _unread(name: str, error: OSError, refused: list[str]) -> list[str]:
    """The problem of a file that could not be read. If the disk may be the cause, it is added to `refused` instead."""
    why = f"{name}: {error.strerror}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return [why]
    refused.append(why)
    return []


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
