"""Checks what a program needs before it begins: installed packages, standard streams, enough open files.

Programs call this before they import any package; it imports nothing slow.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from importlib.util import find_spec
from os.path import relpath
from typing import NoReturn

from common.paths import ROOT
from common.runtime.streams import reopen_closed

# Whatever installs these installs the rest. A package that is installed but broken keeps its own ImportError.
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "peft")

USUAL_OPEN_FILES = 1024
FEWEST_OPEN_FILES = 256  # libraries, data files, connections to other ranks, pipes to processes that prepare data


def begin_program(*, trains: bool) -> None:
    """The first call of every program: check the environment; if the program trains, start the watchdog.

    With the watchdog, SIGTERM and SIGINT are caught and the launcher is watched, also while packages are imported.
    A program that does not train has nothing to save: signals end it as usual.

    Raises:
        SystemExit: code 2 after one line on stderr, see `require_environment`.
    """
    require_environment()
    # peft imports bitsandbytes wherever it is installed, and on a CPU that misses a package that nothing here needs.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if trains:
        from common.runtime import watchdog  # imports psutil, which is installed only if the environment is complete

        watchdog.start()


def require_environment() -> None:
    """Check that packages are installed and that enough files may be open; open closed standard streams.

    Raises:
        SystemExit: code 2 after one line on stderr.
    """
    reopen_closed()
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        script = relpath(ROOT / "launch" / "environment.sh")
        _exit_with_error(f"{sys.executable} has no {', '.join(missing)}: run `source {script}` first")
    _require_open_files()


def is_installed(package: str) -> bool:
    """Whether a package can be imported. A mere directory of that name, such as the one that wandb makes, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _require_open_files() -> None:
    """Raise the limit of open files to the usual one, as far as the system allows.

    Exits if the limit stays too low: the program would hang or fail at an arbitrary place.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < USUAL_OPEN_FILES and soft < hard:
        soft = min(USUAL_OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < FEWEST_OPEN_FILES:
        _exit_with_error(
            f"this shell lets a program open {soft} files, and {FEWEST_OPEN_FILES} are needed: raise the limit, "
            f"ulimit -n {USUAL_OPEN_FILES}"
        )


def _exit_with_error(reason: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {reason}", file=sys.stderr, flush=True)
    sys.exit(2)
