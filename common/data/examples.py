"""Turns a row into records: first into what the row says (`Example`), then into the records of each kind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.data.dialogues import is_open, make_prompt, questions, response_of, unused_keys
from common.data.records import Comparison, Demonstration, Feedback, PlainText, Prompt, Record, Response, user_turns
from common.data.response_columns import LABELS
from common.data.values import BadRow, are_several


class LeftOut(Exception):
    """A row that gives no record of the wanted kind though nothing is wrong with it; the message is the reason, by
    which such rows are counted."""


@dataclass(frozen=True)
class Example:
    """All that one row says.

    Attributes:
        prompt: what is asked; None for plain text alone.
        response: the one to learn from; '' where it is empty or missing.
        pairs: (better, worse) responses.
        open_prompt: what is asked when only prompts are wanted, where that is not `prompt`: a dialogue may end with a
            further question.
        text: plain text.
        tied: whether the row says that no response is better.
        label: whether the response is marked as a good one; None where it is not marked.
    """

    prompt: Prompt | None = None
    response: Response = ""
    pairs: tuple[tuple[Response, Response], ...] = ()
    open_prompt: Prompt | None = None
    text: str = ""
    tied: bool = False
    label: bool | None = None


@dataclass(frozen=True)
class Layout:
    """A set of columns that is understood.

    Attributes:
        required: the columns that every row must have.
        kinds: the kinds of record that its rows can give.
        read: turns a row's columns into an `Example`, or raises BadRow.
        optional: further columns that are used where a row has them.
        user_values: the values of a row that hold the user's messages, see `dialogues.questions`.
        ranked: a column that gives comparisons too where it holds a list of responses.
    """

    required: tuple[str, ...]
    kinds: tuple[str, ...]
    read: Callable[[dict[str, Any]], Example]
    optional: tuple[str, ...] = ()
    user_values: Callable[[dict[str, Any]], Sequence[Any]] = lambda row: ()
    ranked: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns that may say whether a response is a good one."""
        return tuple(column for column in LABELS if column in self.optional)

    def can_give(self, kind: str) -> bool:
        """Whether some rows with the required columns give records of `kind`."""
        comparisons = "comparison" in self.kinds or self.ranked is not None
        if kind == "feedback":
            return comparisons or bool(self.labels)
        return kind in self.kinds or kind == "comparison" and comparisons

    def gives(self, kind: str, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether such rows give records of `kind`."""
        if kind == "feedback":
            labelled = any(row.get(column) is not None for row in rows for column in self.labels)
            return labelled or self.gives("comparison", rows)
        return (
            kind in self.kinds
            or kind == "comparison"
            and self.ranked is not None
            and any(are_several(row.get(self.ranked)) and len(row[self.ranked]) > 1 for row in rows)
        )

    def fits_most(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether at least half of the rows have all required columns: in a mixed file each may lack some."""
        fitting = [row for row in rows if all(row.get(column) is not None for column in self.required)]
        return 2 * len(fitting) >= len(rows)

    def __str__(self) -> str:
        return "/".join(self.required)

    def unused(self, row: dict[str, Any], kind: str) -> Iterator[str]:
        """The parts of a row that records of `kind` do not use: columns, keys of messages, a question at the end."""
        for column, value in row.items():
            if column not in self.required and column not in self.optional:
                yield column
            elif isinstance(value, (list, dict)) and column not in ("tools", "history"):
                for message in value if isinstance(value, list) else [value]:
                    for inner in message if isinstance(message, list) else [message]:
                        yield from (f"{column}: {key}" for key in unused_keys(inner))
                if kind != "prompt" and (column,) == self.required and isinstance(value, list) and is_open(value):
                    yield f"{column}: the question behind the last answer"


def user_turns_in(layout: Layout, row: dict[str, Any]) -> set[tuple[str, ...]]:
    """The user's messages in a row, whatever kind of record is wanted of it.

    They are those of its prompt. If the row gives no prompt, they are read from its columns one by one: then there is
    more than one sequence where the columns differ.
    """
    with contextlib.suppress(BadRow):
        return {user_turns(record) for record in to_records(layout, row, "prompt")}
    with contextlib.suppress(BadRow):
        return {turns for value in layout.user_values(row) if (turns := questions(value))}
    return set()


def to_records(layout: Layout, row: dict[str, Any], kind: str) -> list[Record]:
    """The row as records of `kind`: one, or several comparisons of several responses, or feedback to both of each.

    Raises:
        BadRow: a column is missing, empty or of the wrong type, or the two responses of a pair are the same.
        LeftOut: the row is a tie where comparisons or feedback are wanted, its response is marked as bad or as not to
            be trained, or its text is blank.
    """
    for column in layout.required:
        if row.get(column) is None:
            raise BadRow(f"'{column}' is missing")
    try:
        example = layout.read(row)
    except (RecursionError, OverflowError):
        raise BadRow("a value is nested too deeply, or a number too large") from None
    if kind == "text":
        if not example.text:
            raise LeftOut("blank")
        return [PlainText(example.text)]
    assert example.prompt is not None  # only the layout of plain text gives none
    if kind == "prompt":
        return [example.open_prompt or example.prompt]
    if kind == "demonstration":
        return [_demonstration(example, example.prompt)]
    if example.tied:
        raise LeftOut("a tie")
    if kind == "feedback":
        return list(_feedback(example, example.prompt))
    return [Comparison(example.prompt, *pair) for pair in _pairs(example)]


def _demonstration(example: Example, prompt: Prompt) -> Demonstration:
    if example.label is False:
        raise LeftOut("answer labelled as a bad one")
    response = _filled(example.response, "answer")
    if isinstance(response, str):
        return Demonstration(prompt, response)
    # Of several turns, the last one that is to be trained is the response; those before it belong to the prompt.
    trained = [at for at, message in enumerate(response) if message.role == "assistant" and message.trained]
    if not trained:
        raise LeftOut("no answer that is to be trained")
    *before, last = response[: trained[-1] + 1]
    longer = make_prompt([*prompt.messages, *before], "chosen", tools=prompt.tools)
    added = longer.user_messages[len(prompt.user_messages) :]
    return Demonstration(
        replace(longer, user_messages=prompt.user_messages + added), _filled(response_of([last]), "answer")
    )


def _feedback(example: Example, prompt: Prompt) -> Iterator[Feedback]:
    """That of its label, or of its pairs: each has a desirable response and an undesirable one."""
    if example.pairs:
        for chosen, rejected in _pairs(example):
            yield Feedback(prompt, chosen, True)
            yield Feedback(prompt, rejected, False)
        return
    if example.label is None:
        raise BadRow("'label' is missing")
    marked = _demonstration(replace(example, label=None), prompt)
    yield Feedback(marked.prompt, marked.response, example.label)


def _pairs(example: Example) -> list[tuple[Response, Response]]:
    filled = [pair for pair in dict.fromkeys(example.pairs) if all(map(_is_filled, pair))]
    for chosen, rejected in () if filled else example.pairs:
        _filled(chosen, "chosen answer")
        _filled(rejected, "rejected answer")
    different = [(chosen, rejected) for chosen, rejected in filled if chosen != rejected]
    if not different:
        raise BadRow("chosen and rejected are the same" if example.pairs else "there is one answer, and none beside it")
    return different


def _filled(response: Response, name: str) -> Response:
    if not _is_filled(response):
        raise BadRow(f"the {name} is empty")
    return response


def _is_filled(response: Response) -> bool:
    return bool(response) and (isinstance(response, str) or bool(response[-1].content or response[-1].more))
