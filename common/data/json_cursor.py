"""Reads JSON text value by value, so that a file of any length is never in memory as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from common.data.rows import MAX_ROW_BYTES, TOO_LONG

COMMENTS = ("//", "#")
_CHUNK = 2**16
_LINE_END = re.compile(r"[\r\n]")


class Broken(Exception):
    """JSON that cannot be read further; the message says why and where."""


class Cursor:
    """A place in JSON text, which is read as needed.

    Attributes:
        at: the place in the part of the text that is in memory.
        comments: comment lines that were passed.
        rows: rows begun so far, for errors; the caller counts them.
    """

    def __init__(self, text: TextIO | None, buffer: str = ""):
        self._text, self._buffer, self.at = text, buffer, 0
        self.comments = 0
        self._what = ""
        self.rows = 0

    def _more(self) -> bool:
        if self._text is None:
            return False
        chunk = self._text.read(max(_CHUNK, len(self._buffer) - self.at))
        self._buffer, self.at = self._buffer[self.at :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is neither white space nor part of a comment; '' at the end."""
        while True:
            mark = self._buffer[self.at : self.at + 1]
            if mark in (" ", "\t", "\n", "\r", "\ufeff"):
                self.at += 1
            elif mark == "#" or mark == "/" and self._comes("//"):
                self._pass_comment()
            elif mark or not self._more():
                return mark

    def _comes(self, text: str) -> bool:
        if len(self._buffer) - self.at < len(text):
            self._more()
        return self._buffer.startswith(text, self.at)

    def _pass_comment(self) -> None:
        self.comments += 1
        while (end := _LINE_END.search(self._buffer, self.at)) is None:
            self.at = len(self._buffer)
            if not self._more():
                return
        self.at = end.end()

    def take(self, *marks: str) -> str:
        """Pass the next character, which must be one of `marks`; raises Broken if it is not."""
        mark = self.peek()
        if mark not in marks:
            raise self.broken()
        self.at += 1
        return mark

    def value(self) -> Any:
        """The next value. Raises Broken if it is no JSON, or longer than `MAX_ROW_BYTES`."""
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._buffer, self.at)
                # A number at the end of the buffer may continue in the text that has not been read yet.
                if end < len(self._buffer) or not self._more():
                    self.at = end
                    return value
            except RecursionError:
                raise self.broken("it is nested too deeply") from None
            except ValueError:
                if len(self._buffer) - self.at > MAX_ROW_BYTES or not self._more():
                    raise self.broken() from None

    def broken(self, why: str = "") -> Broken:
        return Broken(
            f"the JSON{self._what} is broken, or a row is {TOO_LONG}, at row {max(self.rows, 1)}"
            + (f": {why}" if why else "")
        )

    def elements(self) -> Iterator[Callable[[], Any]]:
        """For each element of the array that comes next, a function that reads it; call it before taking the next."""
        self.take("[")
        self._what = " array"
        if self.peek() == "]":
            self.take("]")
            return
        mark = ","
        while mark == ",":
            yield self.value
            mark = self.take(",", "]")

    def parts(self) -> Iterator[Callable[[], Any]]:
        """As `elements`, also for the values of an object; any other value is a single part."""
        mark = self.peek()
        if mark == "[":
            yield from self.elements()
        elif mark == "{":
            yield from (self.value for _ in self.members())
        else:
            yield self.value

    def members(self) -> Iterator[str]:
        """Each key of the object that comes next; read its value before taking the next key."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        mark = ","
        while mark == ",":
            if self.peek() != '"':
                raise self.broken()
            key = self.value()
            self.take(":")
            yield key
            mark = self.take(",", "}")
