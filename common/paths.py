"""Paths and hub names, which look alike: `output/sft`, `facebook/opt-1.3b`. What exists locally is never looked up."""
from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from common.distributed import is_main
from common.errors import did_you_mean

OUTPUT = "output"  # where the programs write unless told otherwise


def may_be_on_hub(name: str) -> bool:
    """Whether a name that does not exist locally may be one of the hub, and is not rather a mistyped path."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    owner, slash, _ = name.partition("/")
    if owner == OUTPUT or slash and Path(owner).is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@functools.cache
def announce_lookup(name: str) -> None:
    """Say that a name is looked up on the hub, which may take a while.

    From here on huggingface_hub tries again without a line per attempt; if all fail, that is an error of ours.
    """
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()
    if is_main():  # on stderr: the answers of inference/generate.py go to stdout
        print(f"{name} is no local path: looking it up on the Hugging Face hub", file=sys.stderr, flush=True)


def similar_path(path: Path) -> str:
    """`; did you mean PATH?` for what lies where `path` is missing and is called much alike, or ''."""
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(path.name, beside, before="" if path.parent == Path() else f"{path.parent}/")


def content_digest(paths: Iterable[Path]) -> str:
    """SHA-256, in hex, of what the files hold, one after another; raises OSError for what cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def from_anywhere(name: str) -> str:
    """A path or name to be written down: a directory's absolute path; a hub name or builtin:* as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name


def unreachable_hub(error: BaseException, cache: str | None = None) -> str | None:
    """Why the hub was not reached, and where its files were looked for instead (`cache`; none: where models are kept);
    None for any other error."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled)):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    why = "HF_HUB_OFFLINE=1 forbids to ask the hub" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    return (f"{why}, and it is not in the cache, {cache or constants.HF_HUB_CACHE}: load it once online, or copy it "
            "into a directory and name that")
