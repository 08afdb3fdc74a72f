"""Handles paths, and names on the Hugging Face hub, which look alike: `output/sft`, `facebook/opt-1.3b`.

Imports no package at once: programs need it before they know that packages are installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.errors import InputError, UserError, did_you_mean

ROOT = Path(__file__).resolve().parents[1]  # of the repository, with launch/
OUTPUT = "output"  # where the programs write unless told otherwise
_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[^}]*\})")


def as_typed_in_a_shell(text: str, location: str) -> str:
    """Replace `~`, `~user`, `$NAME` and `${NAME}` in a path.

    A shell does not replace them within quotes and after `--flag=`, and nothing replaces them in a recipe. A path that
    exists as it is written stays the same.

    Args:
        location: the flag or the line of a recipe, for messages.

    Raises:
        UserError: there is no such user or environment variable.
    """

    def value(match: re.Match) -> str:
        if expanded := os.environ.get(match[1].strip("{}")):
            return expanded
        raise UserError(
            f"{location}: {text!r}: the environment variable {match[1].strip('{}')} is not set, or empty: set "
            "it, or write the path out"
        )

    if os.path.exists(text) and not text.startswith("~"):
        return text
    path = os.path.expanduser(_VARIABLE.sub(value, text))
    if path.startswith("~") and not os.path.exists(path):
        user = path.partition("/")[0]
        raise UserError(f"{location}: {text!r}: there is no user {user[1:]}: for a path of that name write ./{user}")
    return path


def may_be_on_hub(name: str) -> bool:
    """Whether a name that does not exist locally may be a hub name; otherwise it is a mistyped path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    owner, slash, _ = name.partition("/")
    if owner == OUTPUT or slash and Path(owner).is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def similar_path(path: Path) -> str:
    """`; did you mean PATH?` for an entry of the same directory with a similar name, or '' if there is none."""
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, siblings, before="" if path.parent == Path() else f"{path.parent}/")


def content_digest(paths: Iterable[Path]) -> str:
    """SHA-256 in hex of the contents of the files, concatenated.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def edges_digest(paths: Iterable[Path]) -> str:
    """SHA-256 in hex of the sizes of the files and of the first and the last MiB of each: quick for files of any size.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(b"%d\0" % size)
        with open(path, "rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(size - 2**20, 0))
            digest.update(stream.read(2**20))
    return digest.hexdigest()


class NotWritable(InputError):
    """A directory that cannot be written to."""


@contextlib.contextmanager
def writing_to(flag: str, directory: str | Path) -> Iterator[None]:
    """As `checked_writing`, for programs: the error is a `UserError` that begins with the flag."""
    try:
        with checked_writing(directory):
            yield
    except NotWritable as error:
        raise UserError(f"{flag} {error}") from error.__cause__


@contextlib.contextmanager
def checked_writing(directory: str | Path) -> Iterator[None]:
    """Within the context, an OSError about the directory, or about what is in it, becomes a `NotWritable`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not _concerns(Path(str(error.filename)), Path(directory)):
            raise
        raise NotWritable(
            directory,
            f"cannot be written to: {error.strerror or error}: free space there or make it writable, or name another "
            "directory",
        ) from error


def _concerns(path: Path, directory: Path) -> bool:
    path, directory = path.absolute(), directory.absolute()
    return path.is_relative_to(directory) or directory.is_relative_to(path)


def follow_umask(*paths: Path) -> None:
    """Set the permissions that the umask gives to new files and directories.

    Temporary directories, and files of libraries that write weights, can be read by their owner only.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for path in paths:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def from_anywhere(name: str) -> str:
    """A path or name to be stored: the absolute path of a directory; a hub name or builtin:* as it is."""
    path = Path(name)
    return str(path.absolute()) if path.is_dir() else name


def unreachable_hub(error: BaseException, cache: str | None = None) -> str | None:
    """The reason, in words, if an error means that the hub cannot be reached; None for any other error.

    Args:
        cache: the directory where the files were searched instead; None: the cache of models.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled)):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    why = "HF_HUB_OFFLINE=1 forbids to ask the hub" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    return (
        f"{why}, and it is not in the cache, {cache or constants.HF_HUB_CACHE}: load it once online, or copy it "
        "into a directory and name that"
    )
