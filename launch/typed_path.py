"""Prints a path that a script was given with `~` and variables replaced, as in every path option of the programs.

python launch/typed_path.py FLAG PATH
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import UserError
from common.paths import as_typed_in_a_shell


def main(flag: str, typed: str) -> int:
    """Returns 2 after the one line that names the flag where there is no such user or variable."""
    try:
        print(as_typed_in_a_shell(typed, flag))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
