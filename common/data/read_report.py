"""Counts the rows of each source: usable, unusable or left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from common.data.errors import BadRowsError
from common.errors import DataError

_SHOWN = 5  # bad rows shown with their place


@dataclass
class Counts:
    """Rows of one source.

    Attributes:
        total: rows read; every one is usable, bad or left out.
        usable: rows that gave records.
        bad: rows that cannot be used; `first_bad` has the first of them as (where, why).
        left_out: rows without a record though nothing is wrong with them, by reason: a tie has no better response, a
            blank text nothing to learn.
        unused: the columns, and keys of messages, that no record uses.
    """

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
    """What was read.

    Attributes:
        sources: the counts of each source, by its name.
        notes: lines for the log.
        inseparable: for each source that no split can divide, a line that says why.
        shared: by source, the hashes of the beginnings that too many dialogues share, see `openings.KeyRule`.
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

    def count_bad(self, source: str, location: str, why: str) -> None:
        counts = self.sources[source]
        counts.bad += 1
        if counts.bad <= _SHOWN:
            counts.first_bad.append((location, why))

    def check(self, max_bad_fraction: float) -> None:
        """Raises DataError if a source has no usable row, BadRowsError if more than the given share of its rows is
        bad."""
        for source, counts in self.sources.items():
            shown = "".join(f"; {location}: {why}" for location, why in counts.first_bad)
            if not counts.usable:
                left_out = "".join(f"; {count:,} left out ({reason})" for reason, count in counts.left_out.items())
                why = left_out + shown if counts.total else ": it is empty"
                raise DataError(source, f"none of its {counts.total} rows can be used{why}")
            if counts.bad > max_bad_fraction * counts.total:
                raise BadRowsError(source, counts.bad, counts.total, max_bad_fraction, shown)
