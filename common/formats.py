"""The number of its format that a file carries which one version of the project writes and another may read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import InputError


def other_format(values: Mapping[str, Any], known: int, unnumbered: int = 0) -> str | None:
    """What the field "format" of a file's content says, if that is another format than `known`; otherwise None.

    Args:
        known: the format that this version reads and writes.
        unnumbered: what a file without the field counts as. 0, an older format, if other files came before numbers.

    Raises:
        ValueError: the field is no whole number.
    """
    number = values.get("format", unnumbered)
    if type(number) is not int:  # nor a bool, which Python counts among the whole numbers
        raise ValueError(f"format is {str(number)[:40]!r}")
    if number == known:
        return None
    age = "an older" if number < known else "a newer"
    return f"it has format {str(number)[:40]}, {age} one than format {known} of this version"


def check_format(values: Mapping[str, Any], known: int, path: Path, advice: str, unnumbered: int = 0) -> None:
    """Raise InputError if the content of the file at `path` is of another format; see `other_format`.

    Args:
        advice: what to do then, for the message.

    Raises:
        ValueError: the field "format" is no whole number.
    """
    if other := other_format(values, known, unnumbered):
        raise InputError(path, f"{other}: {advice}")
