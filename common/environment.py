"""Whether the pinned versions are there. Every program asks before it imports any of them."""
import sys
from importlib.util import find_spec
from os.path import abspath, dirname, join, relpath

# What installs these installs the rest. Installed but broken is not missing: that keeps its own ImportError.
_NEEDED = ("torch", "deepspeed", "transformers", "datasets", "peft")


def require_environment() -> None:
    """Ends the program with one line and exit code 2 where packages are missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        script = relpath(join(dirname(dirname(abspath(__file__))), "launch", "environment.sh"))
        print(f"error: {sys.executable} has no {', '.join(missing)}: run `source {script}` first", file=sys.stderr)
        sys.exit(2)
