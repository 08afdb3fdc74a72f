"""Prints a path with `~` and environment variables expanded, as the programs expand those in their path options.

python launch/typed_path.py FLAG PATH
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import UserError
from common.paths import as_typed_in_a_shell


def main(flag: str, typed: str) -> int:
    """Print the path. Returns the exit code: 2, after one line that names the flag, for an unknown user or variable."""
    try:
        print(as_typed_in_a_shell(typed, flag))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
