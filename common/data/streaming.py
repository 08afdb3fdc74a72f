"""Reads the training rows of a blend pass after pass, row by row, and turns them into ids without keeping them.

The sources are read side by side, a row of each in turn until it has ended, so that a pass takes every row once. Rows
of ids are shuffled in blocks: the buffer is filled, shuffled and emptied before it is filled again. So the order
depends on the seed and on the number of the block alone, and a stream goes on from the beginning of any block: a
checkpoint needs no content of the buffer.

What belongs to another step, is held out or is test data is found row by row, by the rule by which `prepare` does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow

from common.data.blend import SourceSpec
from common.data.encoding import Chunk, Encoder, features
from common.data.errors import BadRowsError, NothingToTrainOnError, SourceError
from common.data.keying import Keyer
from common.data.part_reader import Reader, part_rows
from common.data.prepare import PreparedData
from common.data.read_report import Counts, ReadReport
from common.data.reading import read_row, sourced_records
from common.data.request import DataRequest
from common.data.rows import Row
from common.data.sources import Part, open_source
from common.data.split import assignment
from common.data.tokenization import Codec

_ENCODED_TOGETHER = 256  # records

# Where a stream or a source stands, as values for JSON.
Place = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """Rows of ids that were shuffled together.

    Attributes:
        rows: with the columns of `PreparedData.train`, in the order of training.
        first: the number of the first of them, counted from the beginning of the stream.
        place: where the stream stood before; `RowStream.blocks` goes on from there with this block.
        notes: lines for the log.
    """

    rows: pyarrow.Table
    first: int
    place: Place
    notes: tuple[str, ...] = ()


class RowStream:
    """The training rows of several requests.

    Args:
        requests: of one kind, with streamed sources.
        sample: what `prepare_many` made of the first rows of these requests; says which prompts are test data or held
            out among them, and which openings many dialogues share.
        block_rows: rows of ids that are shuffled together, at least.
        seed: of the order.
    """

    def __init__(
        self, requests: Sequence[DataRequest], codec: Codec, sample: PreparedData, *, block_rows: int, seed: int
    ):
        self._held_out = frozenset(sample.test_prompt_hashes.tolist())
        shared = sample.report.read.shared
        self._sources = [
            _Source(spec, request, Keyer(spec.name, request.split_by, frozenset(shared.get(spec.name, ()))), seed)
            for request in requests
            for spec in request.data_path
        ]
        self._request, self._block_rows, self._seed = requests[0], block_rows, seed
        self._encode = Encoder(
            self._request.kind, self._request.max_tokens, codec, margins=self._request.margin_column is not None
        )

    def blocks(self, place: Place | None = None) -> Iterator[Block]:
        """The blocks from a place on, without end; None: from the beginning.

        Raises:
            DataError: a pass gave no row to train on, or too many of a source's rows are unusable.
            UserError: a source cannot be read.
        """
        here = place or {"block": 0, "first": 0, "pass": 0, "first_of_pass": 0, "read": {}, "sources": None}
        notes: tuple[str, ...] = ()
        while True:
            at = here["sources"] or [None] * len(self._sources)
            cursors = [source.cursor(here["pass"], start) for source, start in zip(self._sources, at)]
            ended = False
            while not ended:
                here = {**here, "sources": [cursor.place for cursor in cursors]}
                rows, report, ended = self._read(cursors)
                if len(rows):
                    order = np.random.default_rng([self._seed, here["block"]]).permutation(len(rows))
                    yield Block(rows.take(order), here["first"], here, notes)
                    notes = ()
                here = {
                    **here,
                    "block": here["block"] + 1,
                    "first": here["first"] + len(rows),
                    "read": self._counted(here["read"], report),
                }
            of_pass = here["first"] - here["first_of_pass"]
            if not of_pass:
                raise NothingToTrainOnError([source.spec.name for source in self._sources], 0, 0, [])
            here = {**here, "pass": here["pass"] + 1, "first_of_pass": here["first"], "sources": None}
            notes = (f"note: pass {here['pass']} over the streamed data had {of_pass:,} rows to train on",)

    def _read(self, cursors: Sequence[_Cursor]) -> tuple[pyarrow.Table, ReadReport, bool]:
        """(the next block's rows of ids in the order of the sources, what was read, whether the pass has ended)."""
        report = ReadReport(sources={source.spec.name: Counts() for source in self._sources})
        tables = [features(self._request.kind, margins=self._encode.margins).arrow_schema.empty_table()]
        ended = False
        while not ended and (missing := self._block_rows - sum(map(len, tables))) > 0:
            chunk: Chunk = []
            while not ended and len(chunk) < min(missing, _ENCODED_TOGETHER):
                taken = [cursor.take() for cursor in cursors]
                ended = not any(taken)
                for source, item in zip(self._sources, taken):
                    if item is not None:
                        chunk += self._training_records(source, *item, report)
            table, _, _ = self._encode(chunk)
            tables.append(table)
        return pyarrow.concat_tables(tables), report, ended

    def _training_records(self, source: _Source, row: Row, reader: Reader | None, report: ReadReport) -> Chunk:
        request, keyer = source.request, source.keyer
        content = read_row(row, reader, keyer.rule.needs_all_turns)
        chunk: Chunk = []
        for sourced in sourced_records(
            source.spec, row, reader, content, keyer, report, self._held_out, pairs_per_prompt=request.pairs_per_prompt
        ):
            place = assignment(sourced.split_key, request.data_split, request.eval_fraction)
            if sourced.split == "train" and not place.is_eval and request.phase in (None, place.phase):
                chunk.append((False, sourced))
        return chunk

    def _counted(self, before: dict[str, list[int]], report: ReadReport) -> dict[str, list[int]]:
        """[rows read, unusable ones] of each source, with those of another block."""
        counted = {
            name: [old + new for old, new in zip(before.get(name, (0, 0)), (counts.total, counts.bad))]
            for name, counts in report.sources.items()
        }
        for name, (total, bad) in counted.items():
            if bad > self._request.max_bad_fraction * total:
                shown = "".join(f"; {location}: {why}" for location, why in report.sources[name].first_bad)
                raise BadRowsError(name, bad, total, self._request.max_bad_fraction, shown)
        return counted


class _Source:
    """One source of a stream: the parts of its training data, each with its reader."""

    def __init__(self, spec: SourceSpec, request: DataRequest, keyer: Keyer, seed: int):
        self.spec, self.request, self.keyer, self.seed = spec, request, keyer, seed
        self._readers: dict[str, Reader | None] = {}

    @cached_property
    def parts(self) -> list[Part]:
        """Those for training, in the order of their names; they are found when they are needed, on one rank alone."""
        return [part for part in open_source(self.spec, self.request.kind).parts if part.split == "train"]

    def reader(self, part: Part) -> Reader | None:
        """How the rows of a part are read, by its first rows; None if no row of it has columns."""
        if part.label not in self._readers:
            rows = part_rows(
                self.spec,
                part,
                self.request.kind,
                self.request.columns,
                self.keyer.column,
                margin_column=self.request.margin_column,
            )
            self._readers[part.label] = next((reader for _, reader in rows if reader is not None), None)
        return self._readers[part.label]

    def cursor(self, number: int, place: Place | None) -> _Cursor:
        """The rows of the pass with this number, from a place on."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.parts))
        return _Cursor(self, [self.parts[index] for index in order], place)


class _Cursor:
    """The rows of a source in one pass, one after another.

    Args:
        parts: of the source, in the order of this pass.
        place: where to go on; None: at the beginning.
    """

    def __init__(self, source: _Source, parts: Sequence[Part], place: Place | None):
        self._source, self._parts = source, parts
        self._part: int = place["part"] if place else 0
        self._taken: int = place["taken"] if place else 0
        self._rows = self._opened(place["rows"] if place else None)

    @property
    def place(self) -> Place:
        return {"part": self._part, "taken": self._taken, "rows": self._rows.place if self._rows else None}

    def take(self) -> tuple[Row, Reader | None] | None:
        """The next row and its reader; None at the end of the pass."""
        while self._rows is not None and self._taken != self._source.request.max_rows:
            if (row := self._rows.take()) is not None:
                self._taken += 1
                return row, self._source.reader(self._parts[self._part])
            self._part += 1
            self._rows = self._opened(None)
        return None

    def _opened(self, place: Any) -> _FileRows | _TableRows | None:
        if self._part == len(self._parts):
            return None
        part = self._parts[self._part]
        return _FileRows(part, place or 0) if part.table is None else _TableRows(self._source.spec.name, part, place)


class _FileRows:
    """The rows of a file. To go on from a place, those before it are read again, but not turned into ids."""

    def __init__(self, part: Part, place: int):
        self.place = place
        self._rows = islice(part.rows(), place, None)

    def take(self) -> Row | None:
        row = next(self._rows, None)
        self.place += row is not None
        return row


class _TableRows:
    """The rows of an IterableDataset, which knows how to go on from a place.

    Args:
        source: its name, for errors.
    """

    def __init__(self, source: str, part: Part, place: dict[str, Any] | None):
        assert part.table is not None  # else it is a file
        table = part.table()
        self._source, self._label, self._table, self._start = source, part.label, table, place
        self._number = self._first = place["number"] if place else 0
        if place is not None:
            table.load_state_dict(place["state"])
        self._rows = iter(table)

    @property
    def place(self) -> dict[str, Any] | None:
        if self._number == self._first:  # its state is that of the beginning until a row has been taken
            return self._start
        return {"number": self._number, "state": self._table.state_dict()}

    def take(self) -> Row | None:
        try:
            values = next(self._rows, None)
        except Exception as error:  # of the network, of a format: each has its own class
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            why = f"what follows row {self._number} of {self._label} cannot be read: {reason}"
            raise SourceError(self._source, why) from error
        if values is None:
            return None
        self._number += 1
        return Row(f"{self._label}:{self._number}", values)
