"""The keys of one source's rows, and what is to be said about them."""

from __future__ import annotations

from collections.abc import Sequence

from common.data.files import Row
from common.data.hints import keep_together
from common.data.openings import Key, KeyRule, all_keys, whole
from common.data.records import PlainText, Record, user_turns
from common.data.split import beginnings, dialogue_hash, parse_split_by

_SHOWN = 40  # characters of an opening
_SHOWN_OPENINGS = 3


class Keyer:
    """Keys the rows of a source, in whatever order they come.

    Args:
        source: its name, for messages.
        split_by: see `split.parse_split_by`.
        shared: the openings that are keyed by more turns, see `openings.KeyRule`.
    """

    def __init__(self, source: str, split_by: str, shared: frozenset[int]):
        self.source, self.column = source, parse_split_by(split_by)
        self.rule = KeyRule(split_by, shared)
        self._rows = 0
        self._first: tuple[int, int] | None = None  # of the first row: the key, and the dialogue as it stands
        self._same_key = self._same_prompt = True
        self._shown = ""
        self._extended: dict[int, list] = {}  # opening -> its text, rows, turns of the longest key

    def key(self, record: Record, asked: set[tuple[str, ...]], row: Row) -> Key | None:
        """The key of a row's record; None where the column has no value. ``asked``: see `examples.asked`."""
        own = user_turns(record)
        if self.column is None:
            # What the source has, and not what a kind of record takes of it: all steps have the same key then.
            key = self.rule.key(next(iter(asked)) if len(asked) == 1 else own)
        elif (value := column_value(row, self.column)) is not None:
            key = Key(value, dialogue_hash(value), 0)
        else:
            return None
        self._note(key, own, of_text=isinstance(record, PlainText))
        return key

    def tested(self, asked: set[tuple[str, ...]], row: Row) -> set[int]:
        """Every `Key.dialogue` that is not for training if this row is test data."""
        if self.column is None:
            return {hash_ for turns in asked for hash_ in all_keys(turns)}
        value = column_value(row, self.column)
        return set() if value is None else {dialogue_hash(value)}

    def _note(self, key: Key, turns: Sequence[str], of_text: bool) -> None:
        self._rows += 1
        if key.turns > 1 and self.rule.split_by == "auto":
            opening = self._extended.setdefault(beginnings(turns[:1])[0], [turns[0], 0, 0])
            opening[1] += 1
            opening[2] = max(opening[2], key.turns)
        if self._first is None:
            self._first, self._shown = (key.dialogue, whole(turns)), turns[0] if self.column is None else key.text
            self._same_key = self._same_prompt = not of_text
        self._same_key = self._same_key and key.dialogue == self._first[0]
        self._same_prompt = self._same_prompt and self._same_key and whole(turns) == self._first[1]

    def extended(self) -> list[str]:
        """Which openings are keyed by more turns than the first, most frequent ones first."""
        found = sorted(self._extended.values(), key=lambda opening: (-opening[1], opening[0]))
        lines = [
            f"{rows:,} rows of {self.source} begin with {_short(text)}: split by the user's first {turns} turns"
            for text, rows, turns in found[:_SHOWN_OPENINGS]
        ]
        if len(found) > _SHOWN_OPENINGS:
            rows = sum(opening[1] for opening in found[_SHOWN_OPENINGS:])
            lines.append(
                f"{rows:,} rows of {self.source} begin with one of {len(found) - _SHOWN_OPENINGS} further "
                "openings that many share: split by more turns likewise"
            )
        return lines

    def inseparable(self) -> str:
        """What all rows have in common, so that no split can part them, or ''."""
        if self._rows < 2 or not self._same_key:
            return ""
        what = (
            f"the same {self.column!r}"
            if self.column is not None
            else "the same prompt"
            if self._same_prompt
            else "the same opening"
        )
        apart = "column:NAME" if self._same_prompt or self.column is not None else "prompt or column:NAME"
        return (
            f"all {self._rows:,} rows of {self.source} have {what}, {_short(self._shown)}, and a split keeps them "
            f"together: {keep_together(apart)}"
        )


def column_value(row: Row, column: str) -> str | None:
    """What a row has in a column as text; None for nothing."""
    value = (row.values or {}).get(column)
    return str(value).strip() or None if value is not None else None


def _short(text: str) -> str:
    """A text's beginning in quotes, on one line, without characters that a terminal obeys."""
    one_line = " ".join(text.split())
    return repr(one_line if len(one_line) <= _SHOWN else f"{one_line[:_SHOWN]}...")
