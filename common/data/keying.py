"""Computes the split keys of one source's rows, and collects notes about them for the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.data.files import Row
from common.data.hints import keep_together
from common.data.openings import KeyRule, SplitKey, all_keys, full_dialogue_hash
from common.data.records import PlainText, Record, user_turns
from common.data.split import dialogue_hash, parse_split_by, prefix_hashes

_SHOWN = 40  # characters of a first turn
_SHOWN_TURNS = 3


@dataclass
class _SharedTurn:
    """A first turn whose dialogues are keyed by more turns: its text, its rows, and the turns of the longest key."""

    text: str
    rows: int = 0
    turns: int = 0


class Keyer:
    """Keys the rows of a source, in whatever order they come.

    Args:
        source: its name, for messages.
        split_by: see `split.parse_split_by`.
        shared: the beginnings that too many dialogues share, see `openings.KeyRule`.
    """

    def __init__(self, source: str, split_by: str, shared: frozenset[int]):
        self.source, self.column = source, parse_split_by(split_by)
        self.rule = KeyRule(split_by, shared)
        self._rows = 0
        self._first: tuple[int, int] | None = None  # of the first row: `SplitKey.dialogue` and `full_dialogue_hash`
        self._same_key = self._same_prompt = True
        self._shown = ""
        self._extended: dict[int, _SharedTurn] = {}  # by the hash of the first turn

    def key(self, record: Record, user_turns_of_row: set[tuple[str, ...]], row: Row) -> SplitKey | None:
        """The key of a row's record; None where the row has no value in the column to split by.

        Args:
            user_turns_of_row: see `examples.user_turns_in`.
        """
        own = user_turns(record)
        if self.column is None:
            # By what the row holds, not by what a kind of record takes of it: so all steps give it the same key.
            key = self.rule.key(next(iter(user_turns_of_row)) if len(user_turns_of_row) == 1 else own)
        elif (value := column_value(row, self.column)) is not None:
            key = SplitKey(value, dialogue_hash(value), 0)
        else:
            return None
        self._count(key, own, of_text=isinstance(record, PlainText))
        return key

    def test_prompt_hashes(self, user_turns_of_row: set[tuple[str, ...]], row: Row) -> set[int]:
        """Every `SplitKey.dialogue` that must not be trained on if this row is test data."""
        if self.column is None:
            return {hash_ for turns in user_turns_of_row for hash_ in all_keys(turns)}
        value = column_value(row, self.column)
        return set() if value is None else {dialogue_hash(value)}

    def _count(self, key: SplitKey, turns: Sequence[str], of_text: bool) -> None:
        self._rows += 1
        if key.turns > 1 and self.rule.split_by == "auto":
            first_turn = self._extended.setdefault(prefix_hashes(turns[:1])[0], _SharedTurn(turns[0]))
            first_turn.rows += 1
            first_turn.turns = max(first_turn.turns, key.turns)
        dialogue = full_dialogue_hash(turns)
        if self._first is None:
            self._first, self._shown = (key.dialogue, dialogue), turns[0] if self.column is None else key.text
            self._same_key = self._same_prompt = not of_text
        self._same_key = self._same_key and key.dialogue == self._first[0]
        self._same_prompt = self._same_prompt and self._same_key and dialogue == self._first[1]

    def extended(self) -> list[str]:
        """Lines that say which first turns are not enough to split by, most frequent ones first."""
        shared_turns = sorted(self._extended.values(), key=lambda turn: (-turn.rows, turn.text))
        lines = [
            f"{turn.rows:,} rows of {self.source} begin with {_short(turn.text)}: split by the user's first "
            f"{turn.turns} turns"
            for turn in shared_turns[:_SHOWN_TURNS]
        ]
        if others := shared_turns[_SHOWN_TURNS:]:
            lines.append(
                f"{sum(turn.rows for turn in others):,} rows of {self.source} begin with one of {len(others)} further "
                "openings that many share: split by more turns likewise"
            )
        return lines

    def inseparable(self) -> str:
        """What all rows have in common, if no split can separate them; else ''."""
        if self._rows < 2 or not self._same_key:
            return ""
        if self.column is not None:
            common = f"the same {self.column!r}"
        else:
            common = "the same prompt" if self._same_prompt else "the same opening"
        apart_by = "column:NAME" if self._same_prompt or self.column is not None else "prompt or column:NAME"
        return (
            f"all {self._rows:,} rows of {self.source} have {common}, {_short(self._shown)}, and a split keeps them "
            f"together: {keep_together(apart_by)}"
        )


def column_value(row: Row, column: str) -> str | None:
    """A row's value in a column as text; None where it is missing or blank."""
    value = (row.values or {}).get(column)
    return str(value).strip() or None if value is not None else None


def _short(text: str) -> str:
    """The beginning of a text in quotes, on one line, without characters that control a terminal."""
    one_line = " ".join(text.split())
    return repr(one_line if len(one_line) <= _SHOWN else f"{one_line[:_SHOWN]}...")
