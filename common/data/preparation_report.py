"""Reports how many rows of a blend became ids, and why others did not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from common.data.errors import NothingToTrainOnError, TooLongError
from common.data.hints import HOLD_OUT_MORE, TEXT_HAS_TEMPLATE, USE_COLUMN
from common.data.read_report import Counts, ReadReport
from common.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SHOWN = 5  # refused rows shown with their place
_FEW = 20  # with fewer rows to evaluate on, a metric changes as much by chance as by training


@dataclass
class PreparationReport:
    """What became of the rows. `read` counts rows, everything else records; a record that the weight of its source
    repeats is counted each time.

    Attributes:
        read: the rows of each source, and those that could not be used.
        refused: records that cannot be written with the template; `first_refused` has (where, why).
        other_phases: records whose prompts belong to another step.
        repeated_prompts: repetitions of a prompt, dropped where prompts alone are wanted.
        marked: records whose text contains marks of a template; `first_marked` has (where, mark).
        too_long: records dropped since the response does not fit.
        prompts_cut: records whose prompt lost its beginning.
        train_rows, eval_rows: the rows that are left.
    """

    read: ReadReport = field(default_factory=ReadReport)
    refused: int = 0
    first_refused: list[tuple[str, str]] = field(default_factory=list)
    other_phases: int = 0
    repeated_prompts: int = 0
    marked: int = 0
    first_marked: list[tuple[str, str]] = field(default_factory=list)
    too_long: int = 0
    prompts_cut: int = 0
    train_rows: int = 0
    eval_rows: int = 0

    def refuse(self, location: str, why: str) -> None:
        self.refused += 1
        if len(self.first_refused) < _SHOWN:
            self.first_refused.append((location, why))

    def mark(self, location: str, mark: str) -> None:
        self.marked += 1
        self.first_marked = self.first_marked or [(location, mark)]

    def add(self, encoded: PreparationReport) -> None:
        """Add the counts of further records that were encoded."""
        self.refused += encoded.refused
        self.first_refused = (self.first_refused + encoded.first_refused)[:_SHOWN]
        self.marked += encoded.marked
        self.first_marked = self.first_marked or encoded.first_marked
        self.too_long += encoded.too_long
        self.prompts_cut += encoded.prompts_cut

    def joined(self, other: PreparationReport) -> PreparationReport:
        """The sums of both."""
        rest: dict[str, Any] = {name: value + vars(other)[name] for name, value in vars(self).items() if name != "read"}
        return PreparationReport(self.read.joined(other.read), **rest)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> PreparationReport:
        """The report that `to_json` wrote; fields that this version does not know are ignored.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: `to_json` did not write the text.
        """
        values = json.loads(text)
        read = _known(ReadReport, values.pop("read"))
        read["sources"] = {source: Counts(**_known(Counts, counts)) for source, counts in read["sources"].items()}
        for counts in read["sources"].values():
            counts.first_bad = [(location, why) for location, why in counts.first_bad]
        return cls(ReadReport(**read), **_known(cls, values))

    def lines(self) -> list[str]:
        """A summary for the log."""
        summary = []
        for source, counts in self.read.sources.items():
            left_out = [f"{count:,} left out ({reason})" for reason, count in counts.left_out.items()]
            read = [f"{_counted(counts.total, 'row')} read", f"{counts.bad:,} unusable", *left_out]
            summary.append(f"{source}: {', '.join(read)}")
        summary += self.read.notes
        summary += [f"note: {line}" for line in self.read.inseparable]
        summary += [f"unusable: {location}: {why}" for location, why in [*self.read.first_bad, *self.first_refused]]
        others = (
            (self.other_phases, "row", "for other steps"),
            (self.repeated_prompts, "repeated prompt", "left out"),
            (self.too_long, "row", "dropped as too long"),
            (self.refused, "row", "refused by the template"),
            (self.prompts_cut, "prompt", "cut on the left"),
        )
        left = [f"{_counted(self.train_rows, 'row')} to train on", f"{self.eval_rows:,} to evaluate on"]
        summary.append(", ".join(left + [f"{_counted(count, noun)} {what}" for count, noun, what in others if count]))
        for location, mark in self.first_marked[:1]:
            summary.append(
                f"warning: {_counted(self.marked, 'row')}, {location} first, {_has(self.marked)} the marks of "
                f"a template ({mark!r}), {TEXT_HAS_TEMPLATE}"
            )
        for source, counts in self.read.sources.items():
            if counts.unused:
                summary.append(f"note: {source}: not used: {', '.join(counts.unused)}; {USE_COLUMN}")
        if not self.eval_rows:
            summary.append(f"note: no row is held out, so nothing is evaluated: {HOLD_OUT_MORE}")
        elif self.eval_rows < _FEW:
            rows = _counted(self.eval_rows, "row") + (" is" if self.eval_rows == 1 else " are")
            summary.append(f"note: {rows} held out, too few to measure much by: {HOLD_OUT_MORE}")
        return summary

    def check(self, max_bad_fraction: float) -> None:
        """Raises DataError if a source has no usable row or too many unusable ones, if the template could not write too
        many, or if nothing is left to train on."""
        self.read.check(max_bad_fraction)
        written = self.refused + self.too_long + self.train_rows + self.eval_rows
        if self.refused > max_bad_fraction * written:
            location, why = self.first_refused[0]
            raise UserError(
                f"{self.refused:,} of {written:,} rows cannot be written with the template, such as {location}: {why}"
            )
        if not self.train_rows and self.too_long:
            raise TooLongError(list(self.read.sources), self.too_long)
        if not self.train_rows:
            raise NothingToTrainOnError(
                list(self.read.sources), self.other_phases, self.eval_rows, self.read.inseparable
            )


def _known(cls: type[DataclassInstance], values: dict[str, Any]) -> dict[str, Any]:
    """The values that the dataclass has a field for."""
    return {field.name: values[field.name] for field in fields(cls) if field.name in values}


def _has(count: int) -> str:
    return "has" if count == 1 else "have"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
