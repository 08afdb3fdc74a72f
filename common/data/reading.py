"""Records out of a blend of sources: the one way in for every program."""
from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from common.data.adapters import ColumnMap, choose_layout, named_layout
from common.data.blend import SourceSpec
from common.data.dialogues import BadRow
from common.data.files import Row
from common.data.keying import Keyer
from common.data.layouts import Layout, to_record
from common.data.layouts import asked as asked_in
from common.data.openings import OpeningCounter
from common.data.records import RECORD_KINDS, Record, user_turns
from common.data.sources import Part, Source, open_source
from common.errors import UserError, did_you_mean

_SHOWN = 5      # bad rows shown with their place
_SAMPLE = 20    # rows whose columns decide the layout of a file: in JSON lines any one row may lack some
_SAID_EVERY = 30    # seconds
_LEFT_OUT = {"text": "blank", "comparison": "a tie"}    # why a row is no record, without fault


@dataclass(frozen=True)
class SourcedRecord:
    """``where``: file and line. ``split``: 'test' if the dialogue occurs in the test data of any source of the
    blend, so that it must never be trained on. ``key``, ``dialogue``: by which the dialogue is told from others, see
    `openings.Key`. ``source``: its name. ``copy``: 0, or the number of the repetition that the source's weight asks
    for; evaluation wants copy 0 alone."""

    record: Record
    where: str
    split: str
    key: str
    dialogue: int
    source: str
    copy: int = 0


@dataclass
class Counts:
    """Rows of one source. ``left_out``: by reason, those that are left out without fault (a tie has no better
    answer, a blank text nothing to learn). ``first_bad``: the first bad ones, as (where, why)."""

    total: int = 0
    usable: int = 0
    bad: int = 0
    first_bad: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def joined(self, other: Counts) -> Counts:
        """The sums of both."""
        left_out = {reason: self.left_out.get(reason, 0) + other.left_out.get(reason, 0)
                    for reason in {**self.left_out, **other.left_out}}
        return Counts(self.total + other.total, self.usable + other.usable, self.bad + other.bad,
                      self.first_bad + other.first_bad, left_out)


@dataclass
class ReadReport:
    """What was read, by source name.

    ``notes``: lines for the log. ``inseparable``: of sources that no split can part, why. ``shared``: the openings
    by which dialogues were keyed by more turns, see `openings.KeyRule`.
    """

    sources: dict[str, Counts] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    inseparable: list[str] = field(default_factory=list)
    shared: dict[str, list[int]] = field(default_factory=dict)

    def joined(self, other: ReadReport) -> ReadReport:
        """The sums of both."""
        sources = dict(self.sources)
        for source, counts in other.sources.items():
            sources[source] = sources[source].joined(counts) if source in sources else counts
        return ReadReport(sources, self.notes + other.notes, self.inseparable + other.inseparable,
                          {**self.shared, **other.shared})

    @property
    def first_bad(self) -> list[tuple[str, str]]:
        """The first bad rows of every source as (where, why)."""
        return [bad for counts in self.sources.values() for bad in counts.first_bad]

    def count_bad(self, source: str, where: str, why: str) -> None:
        counts = self.sources[source]
        counts.bad += 1
        if counts.bad <= _SHOWN:
            counts.first_bad.append((where, why))

    def count_left_out(self, source: str, why: str) -> None:
        left_out = self.sources[source].left_out
        left_out[why] = left_out.get(why, 0) + 1

    def check(self, max_bad_fraction: float) -> None:
        """Raises UserError if a source has no usable row or more bad ones than the given share of its
        rows."""
        for source, counts in self.sources.items():
            shown = "".join(f"; {where}: {why}" for where, why in counts.first_bad)
            if not counts.usable:
                raise UserError(f"{source}: none of its {counts.total} rows can be used{shown}")
            if counts.bad > max_bad_fraction * counts.total:
                raise UserError(f"{source}: {counts.bad} of {counts.total} rows cannot be used, "
                                f"more than --max_bad_rows {max_bad_fraction:g} allows{shown}")


def read_records(specs: Sequence[SourceSpec], kind: str, *, columns: Mapping[str, str] | None = None,
                 max_rows: int | None = None, report: ReadReport, tested: set[int] | None = None,
                 split_by: str = "opening",
                 shared: Mapping[str, Collection[int]] | None = None) -> Iterator[SourcedRecord]:
    """The records of ``kind`` (one of ``RECORD_KINDS``) of all sources: first their own test data, then the
    rest.

    ``columns``: see `adapters.ColumnMap`; ``max_rows``: rows read at most of each source's training data,
    and given and counted of its test data, which are read whole, so that no test prompt is trained on.
    ``tested``: a set to be filled with the `openings.all_keys` of every test prompt, also of those whose row
    gives no record of the kind. ``split_by``: see `split.parse_split_by`; with "auto" all rows are read once before,
    except of sources whose ``shared`` openings are known. Bad rows are counted in ``report`` and skipped. Streams:
    what is kept in memory is ``tested`` and, before, 17 bytes for each turn of the user. Raises UserError for a source
    that cannot be read or cannot give records of that kind.
    """
    if kind not in RECORD_KINDS:
        raise ValueError(f"{kind!r} is none of {RECORD_KINDS}")
    column_map = ColumnMap(columns).for_kind(kind)
    sources = [(spec, open_source(spec)) for spec in specs]
    if column_map.names:
        files = {part.label: _columns(part) for _, source in sources for part in source.parts}
        column_map.check({label: found for label, found in files.items() if found})
    keyers: dict[str, Keyer] = {}
    for spec, source in sources:
        report.sources.setdefault(spec.name, Counts())
        if source.left_out:
            report.notes.append(f"{spec.name}: left out, belonging to no split: {', '.join(source.left_out)}")
        if spec.name not in keyers:
            known = (shared or {}).get(spec.name)
            if known is None:
                known = _shared_openings(spec, source, kind, columns, max_rows) if split_by == "auto" else ()
            keyers[spec.name] = Keyer(spec.name, split_by, frozenset(known))
            report.shared[spec.name] = sorted(known)
    tested = set() if tested is None else tested
    for split in ("test", "train"):
        for spec, source in sources:
            keyer = keyers[spec.name]
            counts = report.sources[spec.name]
            parts = [part for part in source.parts if part.split == split]
            rows = chain.from_iterable(_part_rows(spec, part, kind, columns, keyer.column) for part in parts)
            limit = None if split == "test" else max_rows
            for number, (row, reader) in enumerate(islice(rows, limit)):
                record, problem = _record(row, reader)
                whole_dialogue = split == "test" or keyer.rule.needs_all_turns
                asked = reader.asked(row, record, whole_dialogue) if reader is not None else set()
                if split == "test":
                    tested.update(keyer.tested(asked, row))
                if max_rows is not None and number >= max_rows:
                    continue
                counts.total += 1
                key = keyer.key(record, asked, row) if record is not None else None
                if record is not None and key is None:
                    problem = f"'{keyer.column}' is missing, by which to split (--split_by)"
                if problem:
                    report.count_bad(spec.name, row.where, problem)
                elif record is None:
                    report.count_left_out(spec.name, _LEFT_OUT.get(kind, "nothing to learn"))
                if key is None:
                    continue
                counts.usable += 1
                side = "test" if key.dialogue in tested else "train"
                for copy in range(spec.copies(key.text)):
                    yield SourcedRecord(record, row.where, side, key.text, key.dialogue, spec.name, copy)
    for keyer in keyers.values():
        report.notes += keyer.extended()
        report.inseparable += filter(None, [keyer.inseparable()])


@dataclass(frozen=True)
class _Reader:
    """How the rows of one file become records of a kind, and what is asked in them whatever the kind."""

    kind: str
    layout: Layout
    names: ColumnMap
    asking: Layout
    asking_names: ColumnMap

    def record(self, values: dict[str, Any]) -> Record | None:
        return to_record(self.layout, self.names.rename(values), self.kind)

    def asked(self, row: Row, record: Record | None, whole_dialogue: bool) -> set[tuple[str, ...]]:
        """See `layouts.asked`; where the first turns are enough, those of the record, if there is one, are."""
        if record is not None and (not whole_dialogue or self.kind in ("prompt", "text")):
            return {user_turns(record)}
        if row.values is None or self.kind == "text":
            return set()
        return asked_in(self.asking, self.asking_names.rename(row.values))


def _record(row: Row, reader: _Reader | None) -> tuple[Record | None, str | None]:
    """(a row's record if it has one, what is wrong with it if something is)."""
    if row.values is None or reader is None:
        return None, row.problem or "no columns"
    try:
        return reader.record(row.values), None
    except BadRow as error:
        return None, str(error)


def _part_rows(spec: SourceSpec, part: Part, kind: str, columns: Mapping[str, str] | None,
               split_column: str | None = None) -> Iterator[tuple[Row, _Reader | None]]:
    """The rows of a file, and how to read them."""
    rows, reader = part.rows(), None
    for sample, found in _samples(rows):
        if found:
            if split_column is not None and split_column not in found:
                raise UserError(f"--split_by column:{split_column}: {part.label} has no such column"
                                f"{did_you_mean(split_column, found)}; it has {', '.join(sorted(found))}")
            chosen = []
            for wanted in (kind, kind if kind == "text" else "prompt"):
                names = ColumnMap(columns).for_kind(wanted).within(found)
                chosen += choose_layout(spec.name, names.columns(found), wanted, part.label), names
            reader = _Reader(kind, *chosen)
        else:
            yield from ((row, None) for row in sample)
    if reader is not None:
        yield from ((row, reader) for row in chain(sample, rows))


def _shared_openings(spec: SourceSpec, source: Source, kind: str, columns: Mapping[str, str] | None,
                     max_rows: int | None) -> frozenset[int]:
    """The openings of a source that are keyed by more turns, counted over all rows that are read of it."""
    if kind == "text":
        return frozenset()
    counter, said = OpeningCounter(), time.monotonic()
    for split, limit in (("test", None), ("train", max_rows)):
        parts = [part for part in source.parts if part.split == split]
        rows = chain.from_iterable(_part_rows(spec, part, kind, columns) for part in parts)
        for number, (row, reader) in enumerate(islice(rows, limit), 1):
            for turns in reader.asked(row, None, True) if reader is not None else ():
                counter.add(turns)
            if number % 1000 == 0 and time.monotonic() > said + _SAID_EVERY:
                said = time.monotonic()
                print(f"{spec.name}: {number:,} rows looked through for openings that many dialogues share",
                      file=sys.stderr, flush=True)
    return counter.shared()


def _samples(rows: Iterator[Row]) -> Iterator[tuple[list[Row], set[str]]]:
    """A few rows at a time and the columns found in them, up to the first that have any."""
    found: set[str] = set()
    while not found and (sample := list(islice(rows, _SAMPLE))):
        found = {column for row in sample if row.values is not None for column in row.values}
        yield sample, found


def _columns(part: Part) -> set[str]:
    return set().union(*(found for _, found in _samples(part.rows())))


def fingerprint(spec: SourceSpec, columns: Mapping[str, str] | None, max_rows: int | None) -> str:
    """A hash (hex) of all that decides which records a source gives: its content, whatever place it lies in,
    its weight, the column map and ``max_rows``. Hub data sets are taken at the version that `datasets` has
    cached."""
    source = open_source(spec)
    layout = named_layout(spec.name)
    content = [[part.name, part.split, part.digest()] for part in source.parts]
    state = [content, layout and str(layout), spec.weight, sorted((columns or {}).items()), max_rows]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
