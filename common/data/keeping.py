"""Keeps columns of the data, and the dialogue itself, beside the ids of a prompt, for what judges its responses."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from typing import Any

from common.data.errors import DeclaredColumnError, KeptColumnsError
from common.data.records import Message, Prompt
from common.data.values import BadRow
from common.errors import did_you_mean

KEPT = "kept"  # the column of prepared prompts that holds them, as `kept_json` writes it


@dataclass(frozen=True)
class KeptColumns:
    """Which columns of a row are kept, by the data's own names.

    Attributes:
        required: a row without one is a bad row.
        optional: kept where a row has them.
        everything: all that a row has is kept.
        declared: by column, the name of the reward that needs it, for messages.
        given: names of what such a reward gets besides columns, for messages.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    everything: bool = False
    declared: Mapping[str, str] = field(default_factory=dict)
    given: tuple[str, ...] = ()

    def of(self, values: Mapping[str, Any]) -> str:
        """The kept columns of a row, a JSON object. Raises BadRow if one is missing or cannot be written as JSON."""
        for column in self.required:
            if values.get(column) is None:
                raise BadRow(f"'{column}' is missing")
        kept = {column: value for column, value in values.items() if self.keeps(column)}
        for column, value in kept.items():
            try:
                kept[column] = json.loads(json.dumps(value, default=_plain))
            except (TypeError, ValueError, RecursionError):
                raise BadRow(f"'{column}' is no text, number, list or object") from None
        return json.dumps(kept, sort_keys=True)  # in ASCII: a column may hold half of a surrogate pair

    def decisive(self) -> list[Any]:
        """All that decides what is kept."""
        return [self.required, self.optional, self.everything]

    def keeps(self, column: str) -> bool:
        return self.everything or column in self.required or column in self.optional

    def check(self, files: Mapping[str, Collection[str]]) -> None:
        """Raises KeptColumnsError or DeclaredColumnError if none of the files of a source (label -> columns found) has
        a column that is required."""
        for column in self.required:
            if files and not any(column in columns for columns in files.values()):
                label, columns = next(iter(files.items()))
                found = f"; it has {', '.join(sorted(columns))}"
                if column in self.declared:
                    why = f"its parameter {column} is a column of the data, but {label} has none of that name"
                    raise DeclaredColumnError(
                        self.declared[column], f"{why}{did_you_mean(column, [*columns, *self.given])}{found}"
                    )
                raise KeptColumnsError(column, f"{label} has no such column{did_you_mean(column, columns)}{found}")


def kept_json(columns: str, prompt: Prompt, location: str) -> str:
    """What is kept of a prompt, a JSON object with the keys columns, messages and row.

    Args:
        columns: as of `KeptColumns.of`.
        location: where the row stands in the data, as file:line.
    """
    return f'{{"columns": {columns}, "messages": {json.dumps(messages_of(prompt))}, "row": {json.dumps(location)}}}'


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """A dialogue as messages {"role": ..., "content": ...}, with the further keys that a message has."""
    return [
        {"role": message.role, "content": message.content, **(json.loads(message.more) if message.more else {})}
        for message in prompt.messages
    ]


def prompt_of(messages: list[dict[str, Any]]) -> Prompt:
    """The dialogue that `messages_of` wrote, without its tools."""
    turns = []
    for message in messages:
        more = {name: value for name, value in message.items() if name not in ("role", "content")}
        turns.append(Message(message["role"], message["content"], json.dumps(more, sort_keys=True) if more else ""))
    return Prompt(tuple(turns))


def _plain(value: Any) -> Any:
    """A value that JSON does not know, in what it knows."""
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if hasattr(value, "tolist"):  # of numpy
        return value.tolist()
    raise TypeError
