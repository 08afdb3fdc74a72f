"""Checkpoints on disk: each is whole, or it does not exist.

All ranks write their shards into a temporary directory. What they wrote is hashed and brought to the disk before a
manifest lists it; only then does a rename give the directory its name, and a pointer, replaced in one piece, say that
it is the newest. Older ones are deleted last. So whatever happens at whatever moment, the newest whole checkpoint is
found again, and a damaged one is recognised.

All methods are called by all ranks together unless they say otherwise; the directory is one that every rank sees.
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from common.distributed import barrier, gather_objects, is_main, rank, world_size

MANIFEST = "manifest.json"
POINTER = "newest"
_PARTIAL = ".partial"
_BLOCK = 1 << 20


class NotSaved(Exception):
    """A checkpoint could not be written; what was there before is as it was. Raised on all ranks alike."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: holds a directory step-N for each.
        keep: how many of the newest stay, once training has gone on from the newest.
    """

    def __init__(self, directory: str | Path, keep: int):
        self.directory, self.keep = Path(directory), keep

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Publish what `write` puts into the directory it is given.

        Args:
            write: called on every rank; an OSError that it raises on some of them must come after all its collectives.

        Raises:
            NotSaved: the disk refused; the message names the path and the bytes needed.
        """
        final = self.directory / f"step-{step}"
        partial = self.directory / f"{_PARTIAL}-{step}"
        self._together(lambda: self._make_room(partial), partial, on_main_only=True)
        self._together(lambda: write(partial), partial)
        listed = self._together(lambda: _digests(partial), partial)
        self._together(lambda: self._publish(partial, final, listed), partial, on_main_only=True)
        return final

    def newest_whole(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is what its manifest says, or None; `say` is told of each that is not."""
        for path in self._by_age():
            problems = self.problems(path)
            if not problems:
                return path
            say(f"warning: checkpoint {path} is not whole ({'; '.join(problems[:3])}): looking for the one before")
        return None

    def problems(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint: files missing, of another size or content. Empty if it is whole."""
        found = []
        try:
            files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
            expected = sorted((str(name), int(size), str(digest)) for name, (size, digest) in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            expected, found = [], [f"{MANIFEST} cannot be read: {error}"]
        for name, size, digest in expected[rank()::world_size()]:
            found += _problem(path / name, name, size, digest)
        return sorted({problem for problems in gather_objects(found) for problem in problems})

    def prune(self) -> None:
        """Remove what is more than `keep`: the newest has proven good."""
        if is_main():
            self._keep_newest(self.keep)

    def newest_before(self, step: int) -> Path | None:
        """The newest checkpoint taken after fewer steps; not read, so that any rank may ask alone."""
        paths = [path for path in self.directory.glob("step-*") if -1 < _step(path) < step]
        return max(paths, key=_step, default=None)

    def clean(self) -> None:
        """Remove what an interrupted save has left."""
        if is_main():
            for left in self.directory.glob(f"{_PARTIAL}-*"):
                shutil.rmtree(left, ignore_errors=True)
        barrier()

    def delete(self) -> None:
        """Remove all checkpoints."""
        if is_main():
            shutil.rmtree(self.directory, ignore_errors=True)
        barrier()

    def _by_age(self) -> list[Path]:
        """Finished checkpoints, that of the pointer first, then the newest; the same list on all ranks."""
        paths = {path.name: path for path in self.directory.glob("step-*") if path.is_dir()
                 and path.name.removeprefix("step-").isdecimal()} if is_main() else {}
        names = sorted(paths, key=lambda name: -int(name.removeprefix("step-")))
        try:
            pointed = (self.directory / POINTER).read_text(encoding="utf-8").strip() if is_main() else ""
        except (OSError, ValueError):
            pointed = ""
        names = gather_objects(sorted(names, key=lambda name: name != pointed))[0]
        return [self.directory / name for name in names]

    def _make_room(self, partial: Path) -> None:
        for left in self.directory.glob(f"{_PARTIAL}-*"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def _publish(self, partial: Path, final: Path, listed: list[dict]) -> None:
        files = {name: entry for part in listed for name, entry in part.items()}
        _write_durably(partial / MANIFEST, json.dumps({"files": files}, indent=1))
        for directory in sorted({(partial / name).parent for name in files} | {partial}):
            _sync(directory)
        if final.exists():  # of a run that was told not to resume, or a damaged one
            shutil.rmtree(final)
        os.rename(partial, final)
        _sync(self.directory)
        _write_durably(self.directory / f"{POINTER}.new", final.name)
        os.replace(self.directory / f"{POINTER}.new", self.directory / POINTER)
        _sync(self.directory)
        # Nothing has been computed from the newest yet: until `prune` the one before stays too.
        self._keep_newest(max(self.keep, 2), final)

    def _keep_newest(self, keep: int, final: Path | None = None) -> None:
        for old in [path for path in self.directory.glob("step-*") if path != final]:
            newer = [path for path in self.directory.glob("step-*") if _step(path) > _step(old)]
            if len(newer) >= keep:
                shutil.rmtree(old, ignore_errors=True)

    def _together(self, action: Callable, partial: Path, on_main_only: bool = False) -> list:
        """Every rank's result; if the disk fails on one of them, nothing is left and all raise."""
        result = failure = None
        try:
            if is_main() or not on_main_only:
                result = action()
        except OSError as error:
            failure = error.strerror or str(error)
        outcomes = gather_objects((failure, result))
        failures = [(number, message) for number, (message, _) in enumerate(outcomes) if message]
        if failures:
            if is_main():
                written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
                shutil.rmtree(partial, ignore_errors=True)
            else:
                written = 0
            number, message = failures[0]
            written, needed = gather_objects(written)[0], gather_objects(self._size_of_newest())[0]
            raise NotSaved(f"no checkpoint could be written to {self.directory}: {message} (rank {number}, after "
                           f"{written:,} bytes{f' of about {needed:,}' if needed else ''}): free space there")
        return [result for _, result in outcomes]

    def _size_of_newest(self) -> int:
        newest = max(self.directory.glob("step-*"), key=_step, default=None)
        return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) if newest else 0


def _step(path: Path) -> int:
    name = path.name.removeprefix("step-")
    return int(name) if name.isdecimal() else -1


def _digests(directory: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of this rank's share of the files, each brought to the disk."""
    barrier()  # every rank has written
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    found = {}
    for name in names[rank()::world_size()]:
        _sync(directory / name)
        found[name] = ((directory / name).stat().st_size, _sha256(directory / name))
    return found


def _problem(path: Path, name: str, size: int, digest: str) -> list[str]:
    try:
        if path.stat().st_size != size:
            return [f"{name} has {path.stat().st_size:,} bytes, not {size:,}"]
        return [] if _sha256(path) == digest else [f"{name} has other content than was written"]
    except OSError as error:
        return [f"{name}: {error.strerror}"]


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
