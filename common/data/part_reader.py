"""Reads the rows of one part of a source (a file, a split), each with the way to make records of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from common.data.adapters import ColumnMap, choose_layout
from common.data.blend import SourceSpec
from common.data.errors import MarginColumnError, SplitByError
from common.data.examples import Layout, LeftOut, to_records, user_turns_in
from common.data.records import Comparison, Record, user_turns
from common.data.rows import Note, Row, ignore
from common.data.sources import Part
from common.data.values import BadRow, margin_of
from common.errors import did_you_mean

_SAMPLE = 20  # rows whose columns decide the layout of a file: in JSON lines any one row may lack some


@dataclass(frozen=True)
class Reader:
    """How the rows of one file become records.

    Attributes:
        kind: of the records.
        layout, names: the layout for this kind, and the column map that fits the file.
        prompt_layout, prompt_names: those by which prompts are read, so that a row's user turns are the same whatever
            kind of record is wanted.
        margin_column: the column that holds the margins of comparisons; None without one.
    """

    kind: str
    layout: Layout
    names: ColumnMap
    prompt_layout: Layout
    prompt_names: ColumnMap
    margin_column: str | None = None

    def user_turns(self, row: Row, records: Sequence[Record], all_turns: bool) -> set[tuple[str, ...]]:
        """The user's messages in a row, see `examples.user_turns_in`.

        Unless `all_turns` are needed, those of its records are enough, if it has any.
        """
        if records and (not all_turns or self.kind in ("prompt", "text")):
            return {user_turns(records[0])}
        if row.values is None or self.kind == "text":
            return set()
        return user_turns_in(self.prompt_layout, self.prompt_names.rename(row.values))

    def unused(self, row: Row) -> list[str]:
        """The columns, and keys of messages, that the records do not use."""
        if row.values is None:
            return []
        return sorted(set(self.layout.unused(self.names.rename(row.values), self.kind)) - {self.margin_column})


def records_of(row: Row, reader: Reader | None) -> tuple[list[Record], str | Exception | None]:
    """(the records of a row, why it has none or None): BadRow or a text for a bad row, LeftOut for one left out."""
    if row.values is None or reader is None:
        return [], row.problem or "no columns"
    try:
        records = to_records(reader.layout, reader.names.rename(row.values), reader.kind)
        return _with_margin(records, row.values, reader.margin_column), None
    except (BadRow, LeftOut) as reason:
        return [], reason


def _with_margin(records: list[Record], values: Mapping[str, Any], column: str | None) -> list[Record]:
    if column is None:
        return records
    margin = margin_of(values.get(column), column)
    return [replace(record, margin=margin) if isinstance(record, Comparison) else record for record in records]


def part_rows(
    spec: SourceSpec,
    part: Part,
    kind: str,
    columns: Mapping[str, str] | None,
    split_column: str | None = None,
    note: Note = ignore,
    margin_column: str | None = None,
) -> Iterator[tuple[Row, Reader | None]]:
    """The rows of a part, each with its reader; None as the reader of rows that come before the first with columns.

    Raises:
        SplitByError: the part has no `split_column`.
        MarginColumnError: it has no `margin_column`.
        UserError: no layout fits its columns.
    """
    rows = part.rows(note)
    sample: list[Row] = []
    reader = None
    for sample, present in _samples(rows):
        if not present:
            yield from ((row, None) for row in sample)
            continue
        if split_column is not None and split_column not in present:
            raise SplitByError(f"column:{split_column}", _no_such_column(split_column, part, present))
        if margin_column is not None and margin_column not in present:
            raise MarginColumnError(margin_column, _no_such_column(margin_column, part, present))
        prompt_kind = "text" if kind == "text" else "prompt"
        reader = Reader(
            kind,
            *_chosen(spec, part, kind, columns, sample),
            *_chosen(spec, part, prompt_kind, columns, sample),
            margin_column,
        )
    if reader is not None:
        yield from ((row, reader) for row in chain(sample, rows))


def columns_of(part: Part) -> set[str]:
    """The columns of a part's first rows that have any."""
    return set().union(*(present for _, present in _samples(part.rows())))


def _no_such_column(column: str, part: Part, present: set[str]) -> str:
    return f"{part.label} has no such column{did_you_mean(column, present)}; it has {', '.join(sorted(present))}"


def _chosen(
    spec: SourceSpec, part: Part, kind: str, columns: Mapping[str, str] | None, sample: Sequence[Row]
) -> tuple[Layout, ColumnMap]:
    present = _columns_in(sample)
    names = ColumnMap(columns).for_kind(kind).within(present)
    renamed: list[dict[str, Any]] = [names.rename(row.values) for row in sample if row.values is not None]
    return choose_layout(spec.name, names.columns(present), kind, part.label, renamed), names


def _samples(rows: Iterator[Row]) -> Iterator[tuple[list[Row], set[str]]]:
    """A few rows at a time and the columns found in them, up to the first that have any."""
    columns: set[str] = set()
    while not columns and (sample := list(islice(rows, _SAMPLE))):
        columns = _columns_in(sample)
        yield sample, columns


def _columns_in(rows: Sequence[Row]) -> set[str]:
    return {column for row in rows if row.values is not None for column in row.values}
