"""Defines what the readers of all files share: rows, the format that the user states, lines of limited length."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from common.errors import DataError

# Longest row of a text file, in characters: the most that a hostile or broken file can make a reader keep in memory.
MAX_ROW_BYTES = 8 * 2**20
TOO_LONG = f"longer than {MAX_ROW_BYTES // 2**20} MiB"

Note = Callable[[str], None]


def ignore(message: str) -> None:
    """A `Note` that does nothing."""


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        location: the file, and the line or, in a file without lines, the row's number, from 1.
        values: column -> value as read; None if there is a problem.
        problem: why the row cannot be read.
    """

    location: str
    values: dict[str, Any] | None
    problem: str | None = None


@dataclass(frozen=True)
class FileFormat:
    """What the user states about files whose content does not show it; None: recognised by the content.

    Attributes:
        data_field: the key that holds the rows, in a JSON file that is one object.
        encoding: of text files that are not UTF-8 and have no byte order mark.
    """

    data_field: str | None = None
    encoding: str | None = None

    def checked(self) -> FileFormat:
        """This format. Raises DataError if there is no such encoding."""
        if self.encoding is not None:
            try:
                # str.encode refuses codecs that are no encodings of text, such as base64.
                "".encode(codecs.lookup(self.encoding).name)
            except (LookupError, ValueError):
                raise DataError(
                    self.encoding,
                    "no such encoding of text; there are utf-8, utf-16, cp1252 (Western Windows), latin-1, cp1251, "
                    "gb18030, big5, shift_jis, euc_kr and more",
                ) from None
        return self


def row_of(location: str, value: Any) -> Row:
    """A JSON value as a row; a list of messages is a dialogue."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and not {"role", "from"}.isdisjoint(value[0]):
        value = {"messages": value}
    return Row(location, value) if isinstance(value, dict) else Row(location, None, "not a JSON object")


def lines(text: TextIO) -> Iterator[tuple[int, str | None]]:
    """(line number, line); None for a line longer than `MAX_ROW_BYTES`, of which no more than that is in memory."""
    number = 0
    while line := text.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES and not line.endswith(("\n", "\r")):
            while line and not line.endswith(("\n", "\r")):
                line = text.readline(MAX_ROW_BYTES)
            yield number, None
        else:
            yield number, line
