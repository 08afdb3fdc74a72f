"""Reads rows from one local file: JSON (.jsonl, .json), tables (.csv, .tsv), plain text (.txt), each also compressed
by gzip or zstd or in a .zip, and .parquet.

A file's name says whether it is JSON, a table or plain text. Everything else is recognised by its content: packing,
encoding, separators, and the form of JSON, see `json_rows`. In plain text each line is a row with the column `text`,
as in `datasets`. Files of any size are streamed. A row that cannot be read is returned as a `Row` with a problem, so
that it can be counted and shown with its place. A file that cannot be read to its end, or is of another kind, is a
UserError.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from common.data.csv_rows import csv_rows
from common.data.encodings import INVALID, encoding_of
from common.data.json_rows import json_rows
from common.data.kinds import GZIP, PARQUET, ZIP, ZSTD, unreadable_kind
from common.data.rows import MAX_ROW_BYTES, TOO_LONG, FileFormat, Note, Row, ignore, lines
from common.errors import UserError

__all__ = [
    "MAX_ROW_BYTES",
    "SUFFIXES",
    "UNDERSTOOD",
    "FileFormat",
    "Row",
    "is_data_file",
    "is_plain_text",
    "kind_of",
    "members",
    "read_rows",
]

_TABLES = (".csv", ".tsv")
_TEXTS = (".jsonl", ".ndjson", ".json", *_TABLES, ".txt")
_PACKED = (".gz", ".zst")
SUFFIXES = (*(text + packed for text in _TEXTS for packed in ("", *_PACKED)), ".parquet", ".zip")
UNDERSTOOD = f"{', '.join(_TEXTS)} (each also with {' or '.join(_PACKED)}), .parquet and .zip"
_HEAD = 2**22  # bytes to look at
_HEAD_OF_KIND = 1024


def is_data_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def is_plain_text(name: str) -> bool:
    return _unpacked(name).endswith(".txt")


def _unpacked(name: str) -> str:
    for suffix in _PACKED:
        name = name.lower().removesuffix(suffix)
    return name


def kind_of(path: Path) -> str:
    """What a file is and what to do about it, if no rows can be read from it; else ''."""
    try:
        with open(path, "rb") as stream:
            return unreadable_kind(stream.read(_HEAD_OF_KIND))
    except OSError as error:
        return f"no file that can be read ({error.strerror})"


def members(path: Path, label: str) -> list[str] | None:
    """The names of the data files in a zip archive, whatever its name; None if the file is not a zip archive.

    Raises:
        UserError: the archive is damaged or holds no data file.
    """
    try:
        with open(path, "rb") as stream:
            if stream.read(len(ZIP)) != ZIP:
                return None
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    except (zipfile.BadZipFile, RuntimeError, ValueError) as error:
        raise UserError(f"{label}: the zip archive cannot be read: {error}") from error
    except OSError:
        return None  # reported when the file is read
    data_files = [
        name
        for name in names
        if is_data_file(Path(name)) and not name.lower().endswith(".zip") and not name.startswith("__MACOSX/")
    ]
    if "[Content_Types].xml" in names:
        raise UserError(f"{label}: it is an Office document: save it as CSV")
    if not data_files:
        raise UserError(f"{label}: the zip archive holds no data file; it holds {', '.join(names[:5]) or 'nothing'}")
    return sorted(data_files)


def read_rows(
    path: Path, label: str, form: FileFormat = FileFormat(), note: Note = ignore, member: str | None = None
) -> Iterator[Row]:
    """The rows of a file, or of a `member` of a zip archive, in order.

    Args:
        label: the file's name in each row's place and in messages.
        note: called with remarks about a file that can be read.
    """
    name = _unpacked(member or path.name)
    try:
        with ExitStack() as stack:
            stream = _opened(path, member, stack)
            head = _read(stream, _HEAD)
            cut = len(head) == _HEAD
            if what := unreadable_kind(head):
                raise UserError(f"{label}: it is {what}")
            if name.endswith(".parquet") or head.startswith(PARQUET):
                yield from _parquet_rows(_opened(path, member, stack), label)
                return
            encoding = encoding_of(head, cut, form, label)
            start = head.decode(encoding, INVALID)
            # In tables, a line end of the other kind may be part of a field.
            ended = start.partition("\r")[0] if name.endswith(_TABLES) and "\r\n" not in start else start
            newline = "\r" if "\r" in start and "\n" not in ended else "\n"

            def text() -> TextIO:
                return io.TextIOWrapper(_opened(path, member, stack), encoding, INVALID, newline=newline)

            start = start.removeprefix("\ufeff")
            if not name.endswith((*_TABLES, ".txt")):
                yield from json_rows(text, start, cut, label, form, note)
            elif _is_json(start):
                note(f"{label}: it holds JSON, whatever its name says")
                yield from json_rows(text, start, cut, label, form, note)
            elif name.endswith(".txt"):
                yield from _text_rows(text(), label)
            else:
                yield from csv_rows(text(), start, cut, label)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, UnicodeError) as error:
        raise UserError(f"{label}: cannot be read to its end: {error}") from error


def _opened(path: Path, member: str | None, stack: ExitStack) -> BinaryIO:
    """The unpacked content, at its start; the `stack` closes it."""
    stream: BinaryIO
    if member is None:
        stream = stack.enter_context(open(path, "rb"))
    else:
        stream = cast(BinaryIO, stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open(member)))
    beginning = stream.read(4)
    stream.seek(0)
    if beginning.startswith(GZIP):
        return cast(BinaryIO, stack.enter_context(gzip.open(stream)))
    if beginning == ZSTD:
        import pyarrow

        return stack.enter_context(pyarrow.CompressedInputStream(stream, "zstd"))
    return stream


def _read(stream: BinaryIO, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def _is_json(text: str) -> bool:
    """Whether a text begins with a JSON object, or a list of them."""
    start = re.match(r"\s*(?:\[\s*)?(?=\{)", text)
    try:
        return start is not None and isinstance(json.JSONDecoder().raw_decode(text, start.end())[0], dict)
    except (ValueError, RecursionError):
        return False


def _text_rows(text: TextIO, label: str) -> Iterator[Row]:
    for number, line in lines(text):
        location = f"{label}:{number}"
        yield Row(location, None, f"line {TOO_LONG}") if line is None else Row(location, {"text": line.rstrip("\r\n")})


def _parquet_rows(stream: BinaryIO, label: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        # Group by group: asked for all groups at once, pyarrow keeps many in memory.
        for batch in chain.from_iterable(
            file.iter_batches(batch_size=256, row_groups=[group]) for group in range(file.num_row_groups)
        ):
            for at in range(len(batch)):
                number += 1
                location = f"{label}:{number}"
                try:
                    (values,) = batch.slice(at, 1).to_pylist()
                except UnicodeDecodeError:
                    yield Row(location, None, "invalid UTF-8")
                else:
                    yield Row(location, values)
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{label}: cannot be read as parquet: {reason}") from error
