"""Reads rows from JSON text: objects in lines, arrays, objects over several lines, one object that holds the rows under
a key, and tables by column.

Lines are read one by one, so a broken line costs only its own row. In the other forms no place is known at which
reading could start again, so broken JSON ends it. One row at a time is in memory, except for tables by column, which
must be read completely before the first row is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TextIO

from common.data.errors import DataFieldError, SeveralKeysError
from common.data.json_cursor import COMMENTS, Broken, Cursor
from common.data.rows import TOO_LONG, FileFormat, Note, Row, lines, row_of
from common.errors import UserError, did_you_mean

_FIRST_LINES = 3  # where each row has a line of its own, a broken first row shows in one of these
_MAX_TABLE = 2**31  # characters of a table by column
_LOOKED_AT = 50  # lines that decide whether a file is JSON at all
# Keys whose lists of objects are part of one row.
_PARTS = {"conversation", "tools", "functions", "history"}
_MESSAGE = ("role", "from")
# Keys that hold the rows of a file, even where other keys hold texts.
_CONTAINERS = {"data", "rows", "train", "training", "test", "validation", "examples", "instances", "items", "records"}


def json_rows(
    opened: Callable[[], TextIO], head: str, cut: bool, label: str, form: FileFormat, note: Note
) -> Iterator[Row]:
    """The rows of JSON text.

    Args:
        opened: opens the text at its start.
        head, cut: the first part of the text, and whether more follows.
        label: the file, for errors and places.

    Raises:
        UserError: the text is no JSON, or is broken and not written in lines.
        DataFieldError: the file has no key `form.data_field`.
    """
    head = head.replace("\r\n", "\n").replace("\r", "\n")
    shape, otherwise = _shape(head, cut)
    try:
        if shape == "object":
            members = _members(Cursor(opened()), otherwise)
            if members is not None:
                yield from _object_rows(opened, members, label, form, note)
                return
            shape = otherwise
        if shape == "values":
            yield from _value_rows(Cursor(opened()), label, note)
            return
    except Broken as broken:
        raise UserError(
            f"{label}: {broken}; mend it, or write one object per line (.jsonl), where bad rows are skipped"
        ) from None
    if what := _no_json(head, cut):
        raise UserError(f"{label}: {what}")
    yield from _line_rows(opened(), label, note)


def _shape(head: str, cut: bool) -> tuple[str, str]:
    """(the form of the text, the form to assume if it turns out not to be a single object).

    Forms: "lines" of one value each; "object": one object, which is the whole file; "values": arrays, or several
    objects that are not written one per line.
    """
    start = Cursor(None, head)
    mark = start.peek()
    if mark not in ("[", "{"):
        return "lines", ""
    rest = head[start.at :]
    first = rest.partition("\n")[0]
    try:
        value, end = json.JSONDecoder().raw_decode(rest)
    except RecursionError:
        return ("values" if mark == "[" else "lines"), ""
    except ValueError as error:
        if mark == "[":
            return "values", ""
        # Either the value continues behind the head, or it is broken. If every row has a line of its own, a broken one
        # shows in one of the first lines.
        goes_on = cut and (getattr(error, "lineno", 1) > _FIRST_LINES or "\n" not in rest[getattr(error, "pos", 0) :])
        return ("object" if goes_on or first.strip() == "{" else "lines"), ("values" if "\n" in rest else "lines")
    fills_line = end <= len(first.rstrip()) and not rest[end : len(first)].strip()
    if isinstance(value, list):
        if fills_line and value and isinstance(value[0], dict) and not _is_row(value[0]):
            return "lines", ""  # a dialogue a line
        if value and isinstance(value[0], list) and value[0] and isinstance(value[0][0], dict):
            return "values", ""  # an array of dialogues
        # Lines that hold lists of texts are bad rows, each to be reported with its line.
        return ("lines" if fills_line and value and not isinstance(value[0], dict) else "values"), ""
    following = Cursor(None, rest[end:]).peek()
    if not cut and not following:
        return "object", "values"
    return ("lines" if fills_line or following not in (",", "{", "[") else "values"), ""


def _no_json(head: str, cut: bool) -> str:
    """What the text is and what to do, if its first lines show that it is no JSON; else ''."""
    first_lines = [
        line
        for line in map(str.strip, head.split("\n", _LOOKED_AT)[: -1 if cut else _LOOKED_AT])
        if line and not line.startswith(COMMENTS)
    ]
    if first_lines and all(line.startswith("{'") for line in first_lines):
        return "its lines are Python's dictionaries, not JSON: write them with json.dumps"
    if first_lines and not any(line.startswith(("{", "[")) for line in first_lines):
        return (
            f"it is no JSON: its first line is {first_lines[0][:60]!r}; name a file by what it holds: "
            ".csv, .tsv, .txt, .parquet"
        )
    return ""


def _line_rows(text: TextIO, label: str, note: Note) -> Iterator[Row]:
    comments = 0
    try:
        for number, line in lines(text):
            location = f"{label}:{number}"
            if line is None:
                yield Row(location, None, f"line {TOO_LONG}")
            elif line := line.strip(" \t\r\n\ufeff"):
                if line.startswith(COMMENTS):
                    comments += 1
                else:
                    yield _parsed(location, line)
    finally:
        _note_comments(comments, label, note)


def _note_comments(count: int, label: str, note: Note) -> None:
    if count:
        note(f"{label}: {count:,} comment line{'' if count == 1 else 's'} skipped")


def _parsed(location: str, line: str) -> Row:
    if "\0" in line:
        return Row(location, None, "NUL bytes")
    try:
        return row_of(location, json.loads(line))
    except (ValueError, RecursionError):
        return Row(location, None, "broken JSON")


def _array_rows(cursor: Cursor, label: str) -> Iterator[Row]:
    for read in cursor.elements():
        cursor.rows += 1
        yield row_of(f"{label}:{cursor.rows}", read())


def _value_rows(cursor: Cursor, label: str, note: Note) -> Iterator[Row]:
    """The rows of arrays and single objects that follow one another."""
    while mark := cursor.peek():
        if mark == "[":
            yield from _array_rows(cursor, label)
        else:
            cursor.rows += 1
            yield row_of(f"{label}:{cursor.rows}", cursor.value())
        if cursor.peek() == ",":
            cursor.take(",")
    _note_comments(cursor.comments, label, note)


def _members(cursor: Cursor, otherwise: str) -> dict[str, str] | None:
    """The kind of value that each key of the only object has: "rows" (a list of objects), "list", "object", "text" or
    "other".

    None if something follows the object, or if it cannot be read and the text may be `otherwise` "lines".
    """
    members: dict[str, str] = {}
    try:
        for key in cursor.members():
            mark = cursor.peek()
            members[key] = {"[": "list", "{": "object", '"': "text"}.get(mark, "other")
            cursor.rows = 0
            for read in cursor.parts():
                cursor.rows += 1
                value = read()
                if mark == "[" and cursor.rows == 1 and _is_row(value) and key not in _PARTS:
                    members[key] = "rows"
        return None if cursor.peek() else members
    except Broken:
        if otherwise == "lines":
            return None
        raise


def _is_row(value: Any) -> bool:
    """Whether an element of a list is a row rather than a message of a dialogue."""
    return isinstance(value, dict) and not any(name in value for name in _MESSAGE)


def _object_rows(
    opened: Callable[[], TextIO], members: dict[str, str], label: str, form: FileFormat, note: Note
) -> Iterator[Row]:
    """The rows of a file that is one object."""
    holding = [key for key, kind in members.items() if kind == "rows"]
    if "text" in members.values():  # otherwise the object is one row with a list in one of its columns
        holding = [key for key in holding if key.lower() in _CONTAINERS]
    field = form.data_field
    if field is not None and field not in members:
        raise DataFieldError(
            field,
            f"{label} is one JSON object without that key; it has {_named(members)}{did_you_mean(field, members)}",
        )
    if field is None and len(holding) > 1:
        raise SeveralKeysError(label, f"it is one JSON object with rows under {_named(holding)}")
    if field is None and not holding:
        yield from _table_rows(_read_whole(opened(), label), label)
        return
    if field is None:
        (field,) = holding
        others = [key for key in members if key != field]
        note(f"{label}: its rows are those under '{field}'" + (f"; not used: {_named(others)}" if others else ""))
    cursor = Cursor(opened())
    for key in cursor.members():
        cursor.rows = 0
        if key == field:
            yield from (_array_rows(cursor, label) if cursor.peek() == "[" else _table_rows(cursor.value(), label))
            return
        for read in cursor.parts():
            read()


def _read_whole(text: TextIO, label: str) -> Any:
    content = text.read(_MAX_TABLE + 1)
    if len(content) > _MAX_TABLE:
        raise UserError(
            f"{label}: it is one JSON object that must be read as a whole, longer than "
            f"{_MAX_TABLE // 2**30} GiB: write one object per line (.jsonl)"
        )
    return Cursor(None, content).value()


def _named(keys: Iterable[str]) -> str:
    shown = [f"'{key}'" for key in islice(keys, 20)]
    return ", ".join(shown)


def _table_rows(value: Any, label: str) -> Iterator[Row]:
    """The rows of an object that is a table, in any form that pandas writes, or that is itself one row."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(column, dict) and _is_row(column) for column in columns):
        rows = _by_number(value) if _is_numbered(value) else columns
    elif columns and all(
        isinstance(column, list) and not (column and isinstance(column[0], dict)) for column in columns
    ):
        rows = _by_position(value, label)
    else:
        rows = [value]
    for number, row in enumerate(rows, 1):
        yield row_of(f"{label}:{number}", row)


def _is_numbered(table: dict[str, dict]) -> bool:
    """Whether the inner keys are row numbers, so that the outer keys are the columns."""
    return not all(map(str.isdecimal, table)) and all(map(str.isdecimal, chain.from_iterable(table.values())))


def _by_number(table: dict[str, dict]) -> Iterator[dict[str, Any]]:
    for number in dict.fromkeys(chain.from_iterable(table.values())):
        yield {name: column.get(number) for name, column in table.items()}


def _by_position(table: dict[str, list], label: str) -> Iterator[dict[str, Any]]:
    if {"columns", "data"} <= set(table):
        names, rows = table["columns"], table["data"]
        if not (
            all(isinstance(name, str) for name in names)
            and all(isinstance(row, list) and len(row) == len(names) for row in rows)
        ):
            raise UserError(
                f"{label}: it is a table with 'columns' and 'data', but not every column has a name, or "
                "not every list in 'data' a value for each column"
            )
    else:
        lengths = {name: len(column) for name, column in table.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(
                f"{label}: it is one JSON object with lists of different lengths: "
                + ", ".join(f"'{name}' has {length}" for name, length in islice(lengths.items(), 5))
            )
        names, rows = list(table), list(zip(*table.values()))
    return (dict(zip(names, row)) for row in rows)
