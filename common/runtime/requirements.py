"""Whether a program can begin: pinned versions, standard streams, file handles. Asked before anything is imported."""

import os
import resource
import sys
from importlib.util import find_spec
from os.path import join, relpath
from pathlib import Path

from common.runtime.streams import open_closed

# What installs these installs the rest. Installed but broken is not missing: that keeps its own ImportError.
_NEEDED = ("torch", "deepspeed", "transformers", "datasets", "peft")

USUAL_HANDLES = 1024
FEWEST_HANDLES = 256  # libraries, data files, connections to the other ranks and pipes to processes that prepare data


def require_environment() -> None:
    """Ends the program with one line and exit code 2 where packages are missing or too few files may be open."""
    open_closed()
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        root = Path(__file__).resolve().parents[2]
        script = relpath(join(root, "launch", "environment.sh"))
        _refuse(f"{sys.executable} has no {', '.join(missing)}: run `source {script}` first")
    require_handles()


def require_handles() -> None:
    """Raise the limit of open files to the usual one, as far as the system allows.

    Ends the program with one line and exit code 2 where that is not enough: it would hang or fail anywhere.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < USUAL_HANDLES and soft < hard:
        soft = min(USUAL_HANDLES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < FEWEST_HANDLES:
        _refuse(
            f"this shell lets a program open {soft} files, and {FEWEST_HANDLES} are needed: raise the limit, "
            f"ulimit -n {USUAL_HANDLES}"
        )


def _refuse(reason: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {reason}", file=sys.stderr, flush=True)
    sys.exit(2)
