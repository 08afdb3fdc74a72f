"""Records out of a blend of sources: the one way in for every program."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice

from common.data.adapters import ColumnMap, choose_layout, named_layout
from common.data.blend import SourceSpec
from common.data.dialogues import BadRow
from common.data.layouts import openings, to_record
from common.data.records import RECORD_KINDS, Record, identity
from common.data.rows import Note, Row
from common.data.sources import Part, open_source
from common.data.split import dialogue_hash
from common.errors import UserError

_SHOWN = 5      # bad rows shown with their place
_SAMPLE = 20    # rows whose columns decide the layout of a file: in JSON lines any one row may lack some


@dataclass(frozen=True)
class SourcedRecord:
    """``where``: file and line. ``split``: 'test' if the first user turn occurs in the test data of any
    source of the blend, so that it must never be trained on. ``dialogue``: `split.dialogue_hash` of that turn.
    ``copy``: 0, or the number of the repetition that the source's weight asks for; evaluation wants copy 0
    alone."""

    record: Record
    where: str
    split: str
    dialogue: int
    copy: int = 0


@dataclass
class Counts:
    """Rows of one source. What is neither usable nor bad is left out without fault (a tie has no better
    answer, a blank text nothing to learn). ``first_bad``: the first bad ones, as (where, why)."""

    total: int = 0
    usable: int = 0
    bad: int = 0
    first_bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class ReadReport:
    """What was read, by source name."""

    sources: dict[str, Counts] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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
        """Raises UserError if a source has no usable row or more bad ones than the given share of its
        rows."""
        for source, counts in self.sources.items():
            shown = "".join(f"; {where}: {why}" for where, why in counts.first_bad)
            if not counts.usable:
                raise UserError(f"{source}: none of its {counts.total} rows can be used"
                                f"{shown if counts.total else ': it is empty'}")
            if counts.bad > max_bad_fraction * counts.total:
                raise UserError(f"{source}: {counts.bad} of {counts.total} rows cannot be used, "
                                f"more than --max_bad_rows {max_bad_fraction:g} allows{shown}")


def read_records(specs: Sequence[SourceSpec], kind: str, *, columns: Mapping[str, str] | None = None,
                 max_rows: int | None = None, report: ReadReport,
                 tested: set[int] | None = None) -> Iterator[SourcedRecord]:
    """The records of ``kind`` (one of ``RECORD_KINDS``) of all sources: first their own test data, then the
    rest.

    ``columns``: see `adapters.ColumnMap`; ``max_rows``: rows read at most of each source's training data,
    and given and counted of its test data, which are read whole, so that no test prompt is trained on.
    ``tested``: a set to be filled with the `split.dialogue_hash` of every test prompt, also of those whose row
    gives no record of the kind. Bad rows are counted in ``report`` and skipped. Streams: what is kept in memory
    is ``tested``. Raises UserError for a source that cannot be read or cannot give records of that kind.
    """
    if kind not in RECORD_KINDS:
        raise ValueError(f"{kind!r} is none of {RECORD_KINDS}")
    column_map = ColumnMap(columns).for_kind(kind)
    sources = [(spec, open_source(spec, kind)) for spec in specs]
    if column_map.names:
        files = {part.label: _columns(part) for _, source in sources for part in source.parts}
        column_map.check({label: found for label, found in files.items() if found})
    for spec, source in sources:
        report.sources.setdefault(spec.name, Counts())
        report.notes += source.notes
        if source.left_out:
            report.notes.append(f"{spec.name}: left out, belonging to no split: {', '.join(source.left_out)}")
    tested = set() if tested is None else tested
    for split in ("tested", "test", "train"):
        for spec, source in sources:
            counts = report.sources[spec.name]
            parts = [part for part in source.parts if part.split == split]
            wanted = "prompt" if split == "tested" else kind
            records = chain.from_iterable(_part_records(spec, part, wanted, column_map, report.notes.append)
                                          for part in parts)
            limit = max_rows if split == "train" else None
            for number, (row, record, problem, asked) in enumerate(islice(records, limit)):
                if split != "train":
                    tested.update(map(dialogue_hash, asked))
                if split == "tested":
                    continue
                if max_rows is not None and number >= max_rows:
                    continue
                counts.total += 1
                if problem:
                    report.count_bad(spec.name, row.where, problem)
                if record is None:
                    continue
                counts.usable += 1
                dialogue = dialogue_hash(identity(record))
                side = "test" if dialogue in tested else "train"
                for copy in range(spec.copies(identity(record))):
                    yield SourcedRecord(record, row.where, side, dialogue, copy)


def _part_records(spec: SourceSpec, part: Part, kind: str,
                  column_map: ColumnMap, note: Note) -> Iterator[tuple[Row, Record | None, str | None, set[str]]]:
    """(row, its record if it has one, what is wrong with it if something is, what the user first asks in it)."""
    rows, layout = part.rows(note), None
    for sample, found in _samples(rows):
        if found:
            names = column_map.within(found)
            layout = choose_layout(spec.name, names.columns(found), kind, part.label)
        else:
            yield from ((row, None, row.problem or "no columns", set()) for row in sample)
    if layout is None:
        return
    for row in chain(sample, rows):
        record, problem, asked = None, row.problem, set()
        if row.values is not None:
            values = names.rename(row.values)
            try:
                record = to_record(layout, values, kind)
            except BadRow as error:
                problem = str(error)
            asked = openings(layout, values) if record is None else {identity(record)}
        yield row, record, problem, asked


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
    state = [content, layout and str(layout), spec.weight, sorted((columns or {}).items()), max_rows,
             asdict(spec.form)]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
