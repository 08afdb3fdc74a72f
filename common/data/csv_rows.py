"""Reads rows from text tables (.csv, .tsv) with any separator between fields."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import TextIO

from common.data.rows import MAX_ROW_BYTES, TOO_LONG, Row, lines
from common.errors import UserError

_SEPARATORS = (",", ";", "\t", "|")
_LOOKED_AT = 200  # rows that decide about the separator
_DECLARED = re.compile(r"sep=(.)\r?[\n\r]")
_TSV = re.compile(r"\.tsv(\.|$)", re.I)
_SPACED_QUOTE = re.compile(r' +"')


def csv_rows(text: TextIO, head: str, cut: bool, label: str) -> Iterator[Row]:
    """The rows of a table whose first line names the columns; every value is a text.

    Args:
        head, cut: the first part of the text, and whether more follows.
        label: the file, for errors and places.

    Raises:
        UserError: the header is unusable.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    too_long = False

    def unbroken() -> Iterator[str]:
        nonlocal too_long
        for _, line in lines(text):
            too_long = too_long or line is None
            yield "\n" if line is None else line

    skipped = 0
    if declared := _DECLARED.match(head):  # as Excel writes it
        head, skipped = head[declared.end() :], 1
        text.readline()
    separator, spaced = (declared[1], False) if declared else _look(head, cut, "\t" if _TSV.search(label) else ",")
    reader = csv.reader(unbroken(), strict=True, delimiter=separator, skipinitialspace=spaced)
    header = None
    while True:
        first = reader.line_num + skipped + 1
        try:
            fields = next(reader)
            problem = None
        except StopIteration:
            return
        except csv.Error as error:
            fields, problem = [], f"broken CSV ({error})"
        if too_long:
            fields, problem, too_long = [], f"line {TOO_LONG}", False
        location = f"{label}:{first}"
        if header is None:
            fields = [field.strip() for field in fields]
            if problem or len(set(fields)) < len(fields):
                raise UserError(f"{location}: the header is unusable: {problem or 'a column name occurs twice'}")
            header = fields or None
            continue
        if fields and len(fields) != len(header):
            problem = f"{len(fields)} fields where the header has {len(header)}"
        if problem is None:
            if fields:
                yield Row(location, dict(zip(header, fields)))
            continue
        # A quote that is left open swallows the following rows into its field. Each of their lines is counted as bad:
        # otherwise a file that is lost from its middle on would seem to have a single bad row.
        lost = range(first + 1, reader.line_num + skipped + 1) if len(fields) < len(header) else range(0)
        if lost:
            problem += f"; the row runs to line {reader.line_num + skipped}: is a quote left open?"
        yield Row(location, None, problem)
        for number in lost:
            yield Row(f"{label}:{number}", None, f"within the broken row of line {first}")


def _look(head: str, cut: bool, usual: str) -> tuple[str, bool]:
    """(the separator, whether spaces after it are to be dropped).

    It is the separator of the header by which most rows have as many fields as the header. The `usual` one of such
    files is accepted even where few rows agree.
    """
    best, dialect = (0.0, 0), (usual, False)
    for separator in _SEPARATORS:
        spaced = _is_spaced(_parsed(head, cut, separator, spaced=False))
        header, *rows = _parsed(head, cut, separator, spaced)
        agreeing = sum(len(row) == len(header) for row in rows) / len(rows) if rows else 1.0
        if len(header) > 1 and (agreeing > 0.5 or separator == usual) and (agreeing, len(header)) > best:
            best, dialect = (agreeing, len(header)), (separator, spaced)
    return dialect


def _is_spaced(table: list[list[str]]) -> bool:
    """Whether a space follows each separator of the header, or in most rows a quote comes after spaces."""
    header, *rows = table
    return (
        len(header) > 1
        and all(name.startswith(" ") for name in header[1:])
        or sum(any(map(_SPACED_QUOTE.match, row)) for row in rows) > len(rows) / 2
    )


def _parsed(head: str, cut: bool, separator: str, spaced: bool) -> list[list[str]]:
    """The first rows, as far as they can be read; at least one, which may be empty."""
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(head, newline=""), delimiter=separator, skipinitialspace=spaced):
            if row:
                rows.append(row)
            if len(rows) > _LOOKED_AT:
                return rows
    except csv.Error:
        return rows or [[]]
    return (rows[:-1] if cut and len(rows) > 1 else rows) or [[]]
