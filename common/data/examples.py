"""What one row says, and the records of each kind that come of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.data.dialogues import answer_of, is_open, make_prompt, questions, unused_keys
from common.data.records import Answer, Comparison, Demonstration, PlainText, Prompt, Record, user_turns
from common.data.values import BadRow, are_several


class LeftOut(Exception):
    """A row that gives no record of the kind asked for, without fault; the message is the reason, for a count."""


@dataclass(frozen=True)
class Example:
    """All that one row says.

    ``answer``: the one to be learnt, '' where it is empty or missing. ``pairs``: of a better and a worse one.
    ``asks``: what is to be answered, where it is not ``prompt``. ``tied``: no answer is better. ``label``: False for
    an answer that is marked as a bad one.
    """

    prompt: Prompt | None = None
    answer: Answer = ""
    pairs: tuple[tuple[Answer, Answer], ...] = ()
    asks: Prompt | None = None
    text: str = ""
    tied: bool = False
    label: bool = True


@dataclass(frozen=True)
class Layout:
    """``read`` turns a row's columns into an Example or raises BadRow. ``kinds``: the records it can give.
    ``asked``: the values of a row that hold the user's messages, see `dialogues.questions`. ``ranked``: a column that,
    where it holds lists of answers, gives comparisons too."""

    required: tuple[str, ...]
    kinds: tuple[str, ...]
    read: Callable[[dict[str, Any]], Example]
    optional: tuple[str, ...] = ()
    asked: Callable[[dict[str, Any]], Sequence[Any]] = lambda row: ()
    ranked: str | None = None

    def gives(self, kind: str, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether rows such as these give records of ``kind``."""
        return (
            kind in self.kinds
            or kind == "comparison"
            and self.ranked is not None
            and any(are_several(row.get(self.ranked)) and len(row[self.ranked]) > 1 for row in rows)
        )

    def fits_most(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Whether most of the rows have all that it needs: in a mixed file each may lack some columns."""
        fitting = [row for row in rows if all(row.get(column) is not None for column in self.required)]
        return 2 * len(fitting) >= len(rows)

    def __str__(self) -> str:
        return "/".join(self.required)

    def unused(self, row: dict[str, Any], kind: str) -> Iterator[str]:
        """What of a row no record of ``kind`` is made of: columns, keys of messages, a question without an answer."""
        for column, value in row.items():
            if column not in self.required and column not in self.optional:
                yield column
            elif isinstance(value, (list, dict)) and column not in ("tools", "history"):
                for message in value if isinstance(value, list) else [value]:
                    for inner in message if isinstance(message, list) else [message]:
                        yield from (f"{column}: {key}" for key in unused_keys(inner))
                if kind != "prompt" and (column,) == self.required and isinstance(value, list) and is_open(value):
                    yield f"{column}: the question behind the last answer"


def asked(layout: Layout, row: dict[str, Any]) -> set[tuple[str, ...]]:
    """The user's messages in a row, whatever kind of record is wanted of it: as its prompt has them or, where it has
    none, as they can be read; more than one sequence where the columns then differ about them."""
    with contextlib.suppress(BadRow):
        return {user_turns(record) for record in to_records(layout, row, "prompt")}
    with contextlib.suppress(BadRow):
        return {found for value in layout.asked(row) if (found := questions(value))}
    return set()


def to_records(layout: Layout, row: dict[str, Any], kind: str) -> list[Record]:
    """The row as records of ``kind`` (one of ``layout.kinds``): one, or several comparisons of several answers.

    Raises BadRow if a column is missing or empty, of the wrong type, or chosen == rejected; LeftOut for a tie where
    comparisons are asked for, an answer that is not to be learnt from, and a blank text.
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
    assert example.prompt is not None  # of every layout but the one for plain text
    if kind == "prompt":
        return [example.asks or example.prompt]
    if kind == "demonstration":
        return [_demonstration(example, example.prompt)]
    if example.tied:
        raise LeftOut("a tie")
    return [Comparison(example.prompt, *pair) for pair in _pairs(example)]


def _demonstration(example: Example, prompt: Prompt) -> Demonstration:
    if not example.label:
        raise LeftOut("answer labelled as a bad one")
    answer = _filled(example.answer, "answer")
    if isinstance(answer, str):
        return Demonstration(prompt, answer)
    # Of several turns, the last one that is to be trained is the answer.
    trained = [at for at, message in enumerate(answer) if message.role == "assistant" and message.trained]
    if not trained:
        raise LeftOut("no answer that is to be trained")
    *before, last = answer[: trained[-1] + 1]
    whole = make_prompt([*prompt.messages, *before], "chosen", tools=prompt.tools)
    return Demonstration(
        replace(whole, asked=prompt.asked + whole.asked[len(prompt.asked) :]), _filled(answer_of([last]), "answer")
    )


def _pairs(example: Example) -> list[tuple[Answer, Answer]]:
    filled = [pair for pair in dict.fromkeys(example.pairs) if all(map(_is_filled, pair))]
    for chosen, rejected in () if filled else example.pairs:
        _filled(chosen, "chosen answer")
        _filled(rejected, "rejected answer")
    different = [(chosen, rejected) for chosen, rejected in filled if chosen != rejected]
    if not different:
        raise BadRow("chosen and rejected are the same" if example.pairs else "there is one answer, and none beside it")
    return different


def _filled(answer: Answer, name: str) -> Answer:
    if not _is_filled(answer):
        raise BadRow(f"the {name} is empty")
    return answer


def _is_filled(answer: Answer) -> bool:
    return bool(answer) and (isinstance(answer, str) or bool(answer[-1].content or answer[-1].more))
