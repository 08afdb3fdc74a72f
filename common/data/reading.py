"""Records out of a blend of sources: the one way in for every program."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

from common.data.adapters import ColumnMap, choose_layout, named_layout
from common.data.blend import SourceSpec
from common.data.errors import BadRowsError, SplitByError
from common.data.examples import Layout, LeftOut, to_records
from common.data.examples import asked as asked_in
from common.data.hints import SPLIT_BY
from common.data.keying import Keyer
from common.data.openings import OpeningCounter
from common.data.records import RECORD_KINDS, Record, user_turns
from common.data.rows import Note, Row
from common.data.sources import Part, open_source
from common.data.values import BadRow
from common.errors import DataError, did_you_mean

_SHOWN = 5  # bad rows shown with their place
_SAMPLE = 20  # rows whose columns decide the layout of a file: in JSON lines any one row may lack some
_SAID_EVERY = 30  # seconds


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
    """Rows of one source. ``left_out``: those that are neither usable nor bad, by reason (a tie has no better answer, a
    blank text nothing to learn). ``first_bad``: the first bad ones, as (where, why). ``unused``: the columns, and
    the keys of messages, that nothing was made of."""

    total: int = 0
    usable: int = 0
    bad: int = 0
    first_bad: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def joined(self, other: Counts) -> Counts:
        """The sums of both."""
        reasons = Counter(self.left_out) + Counter(other.left_out)
        return Counts(
            self.total + other.total,
            self.usable + other.usable,
            self.bad + other.bad,
            self.first_bad + other.first_bad,
            dict(reasons),
            list(dict.fromkeys(self.unused + other.unused)),
        )


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
        return ReadReport(
            sources, self.notes + other.notes, self.inseparable + other.inseparable, {**self.shared, **other.shared}
        )

    @property
    def first_bad(self) -> list[tuple[str, str]]:
        """The first bad rows of every source as (where, why)."""
        return [bad for counts in self.sources.values() for bad in counts.first_bad]

    def count_bad(self, source: str, where: str, why: str) -> None:
        counts = self.sources[source]
        counts.bad += 1
        if counts.bad <= _SHOWN:
            counts.first_bad.append((where, why))

    def check(self, max_bad_fraction: float) -> None:
        """Raises DataError if a source has no usable row, BadRowsError if it has more bad ones than the given share of
        its rows."""
        for source, counts in self.sources.items():
            shown = "".join(f"; {where}: {why}" for where, why in counts.first_bad)
            if not counts.usable:
                left_out = "".join(f"; {count:,} left out ({reason})" for reason, count in counts.left_out.items())
                raise DataError(
                    source,
                    f"none of its {counts.total} rows can be used"
                    f"{left_out + shown if counts.total else ': it is empty'}",
                )
            if counts.bad > max_bad_fraction * counts.total:
                raise BadRowsError(source, counts.bad, counts.total, max_bad_fraction, shown)


def read_records(
    specs: Sequence[SourceSpec],
    kind: str,
    *,
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    pairs_per_prompt: int | None = None,
    report: ReadReport,
    tested: set[int] | None = None,
    split_by: str = "opening",
    shared: Mapping[str, Collection[int]] | None = None,
) -> Iterator[SourcedRecord]:
    """The records of ``kind`` (one of ``RECORD_KINDS``) of all sources: first their own test data, then the
    rest.

    ``columns``: see `adapters.ColumnMap`; ``max_rows``: rows read at most of each source's training data,
    and given and counted of its test data, which are read whole, so that no test prompt is trained on.
    ``pairs_per_prompt``: comparisons taken of one row at most.
    ``tested``: a set to be filled with the `openings.all_keys` of every test prompt, also of those whose row
    gives no record of the kind. ``split_by``: see `split.parse_split_by`; with "auto" all rows are read once before,
    except of sources whose ``shared`` openings are known. Bad rows are counted in ``report`` and skipped. Streams:
    what is kept in memory is ``tested`` and, before, 17 bytes for each turn of the user. Raises UserError for a source
    that cannot be read or cannot give records of that kind.
    """
    if kind not in RECORD_KINDS:
        raise ValueError(f"{kind!r} is none of {RECORD_KINDS}")
    column_map = ColumnMap(columns).for_kind(kind)
    sources = [(spec, open_source(spec, kind)) for spec in specs]
    if column_map.names:
        files = {part.label: _columns(part) for _, source in sources for part in source.parts}
        column_map.check({label: found for label, found in files.items() if found})
    keyers: dict[str, Keyer] = {}
    for spec, source in sources:
        report.sources.setdefault(spec.name, Counts())
        report.notes += source.notes
        if source.left_out:
            report.notes.append(f"{spec.name}: left out, belonging to no split: {', '.join(source.left_out)}")
        if spec.name not in keyers:
            known = (shared or {}).get(spec.name)
            if known is None:
                known = _shared_openings(spec, kind, columns, max_rows) if split_by == "auto" else ()
            keyers[spec.name] = Keyer(spec.name, split_by, frozenset(known))
            report.shared[spec.name] = sorted(known)
    tested = set() if tested is None else tested
    for split in ("tested", "test", "train"):
        for spec, source in sources:
            keyer = keyers[spec.name]
            counts = report.sources[spec.name]
            parts = [part for part in source.parts if part.split == split]
            wanted = "prompt" if split == "tested" else kind
            rows = chain.from_iterable(
                _part_rows(spec, part, wanted, columns, keyer.column, report.notes.append) for part in parts
            )
            limit = max_rows if split == "train" else None
            for number, (row, reader) in enumerate(islice(rows, limit)):
                records, problem = _records(row, reader)
                whole_dialogue = split != "train" or keyer.rule.needs_all_turns
                asked = reader.asked(row, records, whole_dialogue) if reader is not None else set()
                if split != "train":
                    tested.update(keyer.tested(asked, row))
                if split == "tested":
                    continue
                if max_rows is not None and number >= max_rows:
                    continue
                counts.total += 1
                for column in reader.unused(row) if reader is not None else ():
                    if column not in counts.unused:
                        counts.unused.append(column)
                key = keyer.key(records[0], asked, row) if records else None
                if records and key is None:
                    problem = f"'{keyer.column}' is missing, {SPLIT_BY}"
                if isinstance(problem, LeftOut):
                    counts.leave_out(str(problem))
                elif problem:
                    report.count_bad(spec.name, row.where, str(problem))
                if key is None:
                    continue
                counts.usable += 1
                side = "test" if key.dialogue in tested else "train"
                for record in records[:pairs_per_prompt]:
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

    def records(self, values: dict[str, Any]) -> list[Record]:
        return to_records(self.layout, self.names.rename(values), self.kind)

    def asked(self, row: Row, records: Sequence[Record], whole_dialogue: bool) -> set[tuple[str, ...]]:
        """See `examples.asked`; where the first turns are enough, those of the records, if there are any, are."""
        if records and (not whole_dialogue or self.kind in ("prompt", "text")):
            return {user_turns(records[0])}
        if row.values is None or self.kind == "text":
            return set()
        return asked_in(self.asking, self.asking_names.rename(row.values))

    def unused(self, row: Row) -> list[str]:
        """The columns, and keys of messages, that the records are not made of."""
        return sorted(self.layout.unused(self.names.rename(row.values), self.kind)) if row.values is not None else []


def _records(row: Row, reader: _Reader | None) -> tuple[list[Record], str | Exception | None]:
    """(a row's records, why it has none if so)."""
    if row.values is None or reader is None:
        return [], row.problem or "no columns"
    try:
        return reader.records(row.values), None
    except (BadRow, LeftOut) as reason:
        return [], reason


def _part_rows(
    spec: SourceSpec,
    part: Part,
    kind: str,
    columns: Mapping[str, str] | None,
    split_column: str | None = None,
    note: Note = lambda text: None,
) -> Iterator[tuple[Row, _Reader | None]]:
    """The rows of a file, and how to read them."""
    rows, reader = part.rows(note), None
    for sample, found in _samples(rows):
        if found:
            if split_column is not None and split_column not in found:
                raise SplitByError(
                    f"column:{split_column}",
                    f"{part.label} has no such column{did_you_mean(split_column, found)}; it has "
                    f"{', '.join(sorted(found))}",
                )

            def chosen(wanted: str) -> tuple[Layout, ColumnMap]:
                names = ColumnMap(columns).for_kind(wanted).within(found)
                rows_found = [names.rename(row.values) for row in sample if row.values is not None]
                return choose_layout(spec.name, names.columns(found), wanted, part.label, rows_found), names

            reader = _Reader(kind, *chosen(kind), *chosen("text" if kind == "text" else "prompt"))
        else:
            yield from ((row, None) for row in sample)
    if reader is not None:
        yield from ((row, reader) for row in chain(sample, rows))


def _shared_openings(
    spec: SourceSpec, kind: str, columns: Mapping[str, str] | None, max_rows: int | None
) -> frozenset[int]:
    """The openings of a source that are keyed by more turns, counted over the same rows whatever kind is wanted."""
    if kind == "text":
        return frozenset()
    counter, said = OpeningCounter(), time.monotonic()
    source = open_source(spec)
    for split, limit in (("test", None), ("train", max_rows)):
        parts = [part for part in source.parts if part.split == split]
        rows = chain.from_iterable(_part_rows(spec, part, "prompt", columns) for part in parts)
        for number, (row, reader) in enumerate(islice(rows, limit), 1):
            for turns in reader.asked(row, (), True) if reader is not None else ():
                counter.add(turns)
            if number % 1000 == 0 and time.monotonic() > said + _SAID_EVERY:
                said = time.monotonic()
                print(
                    f"{spec.name}: {number:,} rows looked through for openings that many dialogues share",
                    file=sys.stderr,
                    flush=True,
                )
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
    state = [content, layout and str(layout), spec.weight, sorted((columns or {}).items()), max_rows, asdict(spec.form)]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
