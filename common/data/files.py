"""Rows out of one local file, as they stand: .json (an array or lines), .jsonl, .csv, each also as .gz, and
.parquet.

A file is streamed, whatever its size. A row that cannot be read is returned as a `Row` with a problem, so
that it can be counted and shown with its place; a file that cannot be read on at all is a UserError.
"""
from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
MAX_ROW_BYTES = 8 * 2**20
_CHUNK = 2**16
_BOM = b"\xef\xbb\xbf"
_OTHER_SEPARATOR = re.compile(r"[;\t|]")


@dataclass(frozen=True)
class Row:
    """``where``: the file and the line, or the row's number where a file has no lines, from 1.
    ``values``: column -> value as read, or None if there is a ``problem``."""

    where: str
    values: dict[str, Any] | None
    problem: str | None = None


def is_data_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def read_rows(path: Path, label: str) -> Iterator[Row]:
    """The rows of a file in order; ``label`` stands for the file in each row's place and in messages."""
    name = path.name.lower().removesuffix(".gz")
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rb") as stream:
            head = stream.read(4096).removeprefix(_BOM)
            stream.seek(0)
            if head.startswith(b"version https://git-lfs"):
                raise UserError(f"{label}: this is a git-lfs pointer, not the data; run 'git lfs pull' there")
            if name.endswith(".parquet"):
                yield from _parquet_rows(path, label)
            elif name.endswith(".csv"):
                yield from _csv_rows(stream, label)
            elif name.endswith(".json") and head.lstrip().startswith(b"["):
                yield from _array_rows(stream, label)
            else:
                yield from _line_rows(stream, label)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{label}: cannot be read to its end: {error}") from error


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(line number, line); None for a line over `MAX_ROW_BYTES`, of which never more than that is in
    memory."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_ROW_BYTES)
            yield number, None
        else:
            yield number, line


def _line_rows(stream: BinaryIO, label: str) -> Iterator[Row]:
    for number, line in _lines(stream):
        if line is None or line.strip():
            values, problem = _parsed(line)
            yield Row(f"{label}:{number}", values, problem)


def _parsed(line: bytes | None) -> tuple[dict | None, str | None]:
    if line is None:
        return None, _too_long("line")
    if b"\0" in line:
        return None, "NUL bytes"
    try:
        # Undecodable bytes become lone surrogates, which spoil only the columns that hold them.
        return _row_object(json.loads(line.decode("utf-8", "surrogateescape")))
    except (ValueError, RecursionError):
        return None, "broken JSON"


def _row_object(value: Any) -> tuple[dict | None, str | None]:
    return (value, None) if isinstance(value, dict) else (None, "not a JSON object")


def _too_long(what: str) -> str:
    return f"{what} longer than {MAX_ROW_BYTES // 2**20} MiB"


def _array_rows(stream: BinaryIO, label: str) -> Iterator[Row]:
    # Undecodable bytes become lone surrogates, which make just the rows that hold them unusable.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape")
    buffer, number, mark = text.read(_CHUNK), 0, ","
    at = buffer.index("[") + 1
    while mark != "]":
        found = _next_element(buffer, at, first=number == 0)
        if found is None:
            more = text.read(max(_CHUNK, len(buffer) - at))
            if not more or len(buffer) - at > MAX_ROW_BYTES:
                raise UserError(f"{label}: the JSON array is broken, or {_too_long('an element')}, "
                                f"at row {number + 1}; mend it, or write one object per line (.jsonl), "
                                f"where bad rows are skipped")
            buffer, at = buffer[at:] + more, 0
            continue
        values, mark, at = found
        if values:
            number += 1
            yield Row(f"{label}:{number}", *_row_object(values[0]))


def _next_element(buffer: str, at: int, first: bool) -> tuple[tuple, str, int] | None:
    """((element,) or () at the end of an empty array, the mark behind it, the place behind the mark), or
    None if that is not in the buffer whole. What is broken is never whole."""
    at = _skip_space(buffer, at)
    if first and buffer[at:at + 1] == "]":
        return (), "]", at + 1
    try:
        value, at = json.JSONDecoder().raw_decode(buffer, at)
    except (ValueError, RecursionError):
        return None
    at = _skip_space(buffer, at)
    mark = buffer[at:at + 1]
    return ((value,), mark, at + 1) if mark in (",", "]") else None


def _skip_space(buffer: str, at: int) -> int:
    while buffer[at:at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _csv_rows(stream: BinaryIO, label: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    too_long = False

    def lines() -> Iterator[str]:
        nonlocal too_long
        for _, line in _lines(stream):
            too_long = too_long or line is None
            yield "\n" if line is None else line.decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), strict=True)
    header = None
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
            problem = None
        except StopIteration:
            return
        except csv.Error as error:
            fields, problem = [], f"broken CSV ({error})"
        if too_long:
            fields, problem, too_long = [], _too_long("line"), False
        where = f"{label}:{first}"
        if header is None:
            if problem or len(set(fields)) < len(fields):
                raise UserError(f"{where}: the header is unusable: {problem or 'a column name occurs twice'}")
            if len(fields) == 1 and (mark := _OTHER_SEPARATOR.search(fields[0])):
                shown = "tabs" if mark[0] == "\t" else f"'{mark[0]}'"
                raise UserError(f"{where}: the header is one column, {fields[0]!r}, as if separated by {shown}: "
                                "separate the fields by commas")
            header = fields or None
            continue
        if fields and len(fields) != len(header):
            problem = f"{len(fields)} fields where the header has {len(header)}"
        if problem is None:
            if fields:
                yield Row(where, dict(zip(header, fields)))
            continue
        # A quote left open takes the rows behind it into its field: each of their lines counts, or a file that
        # is lost from its middle on would seem to have one bad row.
        lost = range(first + 1, reader.line_num + 1) if len(fields) < len(header) else range(0)
        if lost:
            problem += f"; the row runs to line {reader.line_num}: is a quote left open?"
        yield Row(where, None, problem)
        for number in lost:
            yield Row(f"{label}:{number}", None, f"within the broken row of line {first}")


def _parquet_rows(path: Path, label: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        # Asked for all groups, pyarrow holds many at a time.
        for batch in chain.from_iterable(file.iter_batches(batch_size=256, row_groups=[group])
                                         for group in range(file.num_row_groups)):
            for at in range(len(batch)):
                number += 1
                where = f"{label}:{number}"
                try:
                    (values,) = batch.slice(at, 1).to_pylist()
                except UnicodeDecodeError:
                    yield Row(where, None, "invalid UTF-8")
                else:
                    yield Row(where, values)
    except pyarrow.ArrowException as error:
        raise UserError(f"{label}: cannot be read as parquet: {str(error).splitlines()[0]}") from error
