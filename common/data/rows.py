"""What every reader of a file gives, and what every one is told about the file."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from common.errors import DataError

# Longest row of a text file, in characters: what a hostile or broken file can make a reader hold.
MAX_ROW_BYTES = 8 * 2**20
TOO_LONG = f"longer than {MAX_ROW_BYTES // 2**20} MiB"

Note = Callable[[str], None]


def ignore(said: str) -> None:
    """Takes a note and does nothing with it."""


@dataclass(frozen=True)
class Row:
    """``where``: the file and the line, or the row's number where a file has no lines, from 1.
    ``values``: column -> value as read, or None if there is a ``problem``."""

    where: str
    values: dict[str, Any] | None
    problem: str | None = None


@dataclass(frozen=True)
class FileFormat:
    """What a file does not say of itself.

    ``data_field``: the key that holds the rows, in a JSON file that is one object. ``encoding``: of text files
    that are not UTF-8 and bear no mark. None: told by looking.
    """

    data_field: str | None = None
    encoding: str | None = None

    def checked(self) -> FileFormat:
        """This format. Raises DataError for an encoding that there is not."""
        if self.encoding is not None:
            try:
                # str.encode refuses what is a codec but no encoding of text, such as base64.
                "".encode(codecs.lookup(self.encoding).name)
            except (LookupError, ValueError):
                raise DataError(
                    self.encoding,
                    "no such encoding of text; there are utf-8, utf-16, cp1252 (Western Windows), latin-1, cp1251, "
                    "gb18030, big5, shift_jis, euc_kr and more",
                ) from None
        return self


def row_of(where: str, value: Any) -> Row:
    """A JSON value as a row; a list of messages is a dialogue."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and not {"role", "from"}.isdisjoint(value[0]):
        value = {"messages": value}
    return Row(where, value) if isinstance(value, dict) else Row(where, None, "not a JSON object")


def lines(text: TextIO) -> Iterator[tuple[int, str | None]]:
    """(line number, line); None for a line over `MAX_ROW_BYTES`, of which never more than that is in memory."""
    number = 0
    while line := text.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES and not line.endswith(("\n", "\r")):
            while line and not line.endswith(("\n", "\r")):
                line = text.readline(MAX_ROW_BYTES)
            yield number, None
        else:
            yield number, line
