"""Reads records from a blend of sources, for every program."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice

from common.data.adapters import ColumnMap, named_layout
from common.data.blend import SourceSpec
from common.data.examples import LeftOut
from common.data.hints import SPLIT_BY
from common.data.keeping import KeptColumns
from common.data.keying import Keyer
from common.data.openings import FirstTurnCounter
from common.data.part_reader import Reader, columns_of, part_rows, records_of
from common.data.read_report import Counts, ReadReport
from common.data.records import RECORD_KINDS, Record
from common.data.rows import Row
from common.data.sources import open_source
from common.data.values import BadRow

_SAID_EVERY = 30  # seconds

# The records of a row, why it has none or None, and the user's messages in it.
RowContent = tuple[Sequence[Record], str | Exception | None, set[tuple[str, ...]]]


@dataclass(frozen=True)
class SourcedRecord:
    """A record and where it comes from.

    Attributes:
        location: file and line.
        split: "test" if the dialogue occurs in the test data of any source of the blend, so that it must never be
            trained on; else "train".
        split_key, dialogue: what tells the dialogue from others, `text` and `dialogue` of `openings.SplitKey`.
        source: the name of the source.
        copy: 0, or the number of the repetition that the source's weight asks for; evaluation uses copy 0 alone.
        kept: the columns that are kept of its row, as of `keeping.KeptColumns.of`; '' if none are wanted.
    """

    record: Record
    location: str
    split: str
    split_key: str
    dialogue: int
    source: str
    copy: int = 0
    kept: str = ""


def read_records(
    specs: Sequence[SourceSpec],
    kind: str,
    *,
    columns: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    pairs_per_prompt: int | None = None,
    report: ReadReport,
    test_prompt_hashes: set[int] | None = None,
    split_by: str = "opening",
    shared: Mapping[str, Collection[int]] | None = None,
    keep: KeptColumns | None = None,
    margin_column: str | None = None,
) -> Iterator[SourcedRecord]:
    """The records of all sources: first their own test data, then the rest.

    Streams: only `test_prompt_hashes` is kept in memory, and before, with "auto", 17 bytes for each turn of the user.

    Args:
        kind: one of `RECORD_KINDS`.
        columns: see `adapters.ColumnMap`.
        max_rows: rows read at most of each source's training data. Test data is read to its end, so that no test prompt
            is trained on, but no more rows of it are yielded and counted.
        pairs_per_prompt: comparisons taken of one row at most, or feedback to the responses of so many.
        report: counts the rows; bad ones are counted and skipped.
        test_prompt_hashes: is filled with the `openings.all_keys` of every test prompt, also of those whose row gives
            no record of the kind.
        split_by: see `split.parse_split_by`. With "auto" all rows are read once before.
        shared: by source, the beginnings that too many dialogues share, where they are known already.
        keep: the columns to keep beside each record.
        margin_column: the column of the data that holds the margins of comparisons; None: they have none.

    Raises:
        DataError: a source cannot be read, or the column map, the way to split or the columns to keep do not fit it.
        UserError: a file cannot be read, or gives no records of the kind.
    """
    if kind not in RECORD_KINDS:
        raise ValueError(f"{kind!r} is none of {RECORD_KINDS}")
    column_map = ColumnMap(columns).for_kind(kind)
    sources = [(spec, open_source(spec, kind)) for spec in specs]
    if column_map.names or keep is not None:
        by_source = [
            {part.label: found for part in source.parts if (found := columns_of(part))} for _, source in sources
        ]
        column_map.check({label: found for files in by_source for label, found in files.items()})
        if keep is not None:
            for files in by_source:
                keep.check(files)
    keyers: dict[str, Keyer] = {}
    for spec, source in sources:
        report.sources.setdefault(spec.name, Counts())
        report.notes += source.notes
        if source.left_out:
            report.notes.append(f"{spec.name}: left out, belonging to no split: {', '.join(source.left_out)}")
        if spec.name not in keyers:
            known = (shared or {}).get(spec.name)
            if known is None:
                known = _shared_first_turns(spec, kind, columns, max_rows) if split_by == "auto" else ()
            keyers[spec.name] = Keyer(spec.name, split_by, frozenset(known))
            report.shared[spec.name] = sorted(known)
    if test_prompt_hashes is None:
        test_prompt_hashes = set()
    for split in ("excluded", "test", "train"):
        for spec, source in sources:
            keyer = keyers[spec.name]
            wanted = "prompt" if split == "excluded" else kind
            margin = margin_column if wanted == "comparison" else None
            rows = chain.from_iterable(
                part_rows(spec, part, wanted, columns, keyer.column, report.notes.append, margin)
                for part in source.parts
                if part.split == split
            )
            limit = max_rows if split == "train" else None
            all_turns = split != "train" or keyer.rule.needs_all_turns
            for number, (row, reader) in enumerate(islice(rows, limit)):
                records, problem, turns = read_row(row, reader, all_turns)
                if split != "train":
                    test_prompt_hashes.update(keyer.test_prompt_hashes(turns, row))
                if split == "excluded" or max_rows is not None and number >= max_rows:
                    continue
                yield from sourced_records(
                    spec,
                    row,
                    reader,
                    (records, problem, turns),
                    keyer,
                    report,
                    test_prompt_hashes,
                    pairs_per_prompt=pairs_per_prompt,
                    keep=keep,
                )
    for keyer in keyers.values():
        report.notes += keyer.extended()
        report.inseparable += filter(None, [keyer.inseparable()])


def read_row(row: Row, reader: Reader | None, all_turns: bool) -> RowContent:
    """What a row says; for `all_turns` see `Reader.user_turns`."""
    records, problem = records_of(row, reader)
    return records, problem, reader.user_turns(row, records, all_turns) if reader is not None else set()


def sourced_records(
    spec: SourceSpec,
    row: Row,
    reader: Reader | None,
    content: RowContent,
    keyer: Keyer,
    report: ReadReport,
    test_prompt_hashes: Collection[int],
    *,
    pairs_per_prompt: int | None = None,
    keep: KeptColumns | None = None,
) -> Iterator[SourcedRecord]:
    """The records of one row, each as often as the weight of its source says; counts the row in `report`.

    Args:
        content: of `read_row`.
        keyer: of the source.
        test_prompt_hashes: dialogues that are test data, see `SourcedRecord.split`.
    """
    (records, problem, turns), counts = content, report.sources[spec.name]
    counts.total += 1
    for column in reader.unused(row) if reader is not None else ():
        if column not in counts.unused and not (keep is not None and keep.keeps(column)):
            counts.unused.append(column)
    key = keyer.key(records[0], turns, row) if records else None
    if records and key is None:
        problem = f"'{keyer.column}' is missing, {SPLIT_BY}"
    kept = ""
    if key is not None and keep is not None:
        try:
            kept = keep.of(row.values or {})
        except BadRow as reason:
            key, problem = None, reason
    if isinstance(problem, LeftOut):
        counts.leave_out(str(problem))
    elif problem:
        report.count_bad(spec.name, row.location, str(problem))
    if key is None:
        return
    counts.usable += 1
    side = "test" if key.dialogue in test_prompt_hashes else "train"
    taken = pairs_per_prompt
    if taken is not None and reader is not None and reader.kind == "feedback":
        taken *= 2  # a comparison has two responses
    for record in records[:taken]:
        for copy in range(spec.copies(key.text)):
            yield SourcedRecord(record, row.location, side, key.text, key.dialogue, spec.name, copy, kept)


def _shared_first_turns(
    spec: SourceSpec, kind: str, columns: Mapping[str, str] | None, max_rows: int | None
) -> frozenset[int]:
    """The beginnings that too many dialogues of a source share, counted over the same rows for every kind of record."""
    if kind == "text":
        return frozenset()
    counter, last_message = FirstTurnCounter(), time.monotonic()
    source = open_source(spec)
    for split, limit in (("test", None), ("train", max_rows)):
        parts = [part for part in source.parts if part.split == split]
        rows = chain.from_iterable(part_rows(spec, part, "prompt", columns) for part in parts)
        for number, (row, reader) in enumerate(islice(rows, limit), 1):
            for turns in reader.user_turns(row, (), True) if reader is not None else ():
                counter.add(turns)
            if number % 1000 == 0 and time.monotonic() > last_message + _SAID_EVERY:
                last_message = time.monotonic()
                print(
                    f"{spec.name}: {number:,} rows looked through for openings that many dialogues share",
                    file=sys.stderr,
                    flush=True,
                )
    return counter.shared()


def fingerprint(spec: SourceSpec, columns: Mapping[str, str] | None, max_rows: int | None) -> str:
    """A hash (hex) of all that decides which records a source gives: its content wherever it lies, its weight, the
    column map and `max_rows`. Hub data sets are taken at the version that `datasets` has cached."""
    source = open_source(spec)
    layout = named_layout(spec.name)
    content = [[part.name, part.split, part.digest()] for part in source.parts]
    state = [content, layout and str(layout), spec.weight, sorted((columns or {}).items()), max_rows, asdict(spec.form)]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
