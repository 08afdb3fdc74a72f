"""Reads the responses of a row, and their order, labels and ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.data.dialogues import is_transcript, is_whole_dialogue, joined, read_dialogue, response_of
from common.data.records import Message, Prompt, Response
from common.data.values import BadRow, are_several, as_text, clean_response, is_texts

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
LABELS = ("label", "kto_tag")  # whether a response is a good one
RANKS = ("scores", "ranks")  # of the responses in a list: a higher score is better, a lower rank


def response_in(value: Any, column: str, prompt: Prompt, question: Any = None) -> Response:
    """One response: a text, messages of which the last is the assistant's, or a whole dialogue that ends with such.

    Args:
        column: where the value is from, for errors.
        prompt: the prompt it responds to; a whole dialogue begins with it.
        question: the value that the prompt was read from.

    Raises:
        BadRow: the value cannot be read, or holds another dialogue.
    """
    if is_whole_dialogue(value) and not is_texts(value):
        messages = without_system(joined(read_dialogue(value, column)))
        while messages and messages[-1].role != "assistant":
            messages.pop()
        before = without_system(prompt.messages)
        if messages[: len(before)] == before:
            messages = messages[len(before) :]
        elif messages and messages[0].role != "assistant":
            raise BadRow(f"'{column}' holds another dialogue than the prompt's")
        return response_of(messages) if messages else ""
    text = clean_response(value, column)
    # Some sets leave the cue out of the prompt and begin the response with it.
    return clean_response(text.removeprefix("Assistant:"), column) if is_transcript(question) else text


def responses_in(value: Any, column: str, prompt: Prompt, question: Any = None) -> tuple[Response, ...]:
    """One response or several: a list of texts, or of lists of messages, is several. Raises as `response_in`."""
    return tuple(response_in(item, column, prompt, question) for item in (value if are_several(value) else [value]))


def without_system(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message.role != "system"]


def goodness(row: dict[str, Any], count: int) -> list[float]:
    """A number for each of the `count` responses of a list, higher for a better one: by scores or ranks, else by their
    order, the best first. Raises BadRow."""
    for column, sign in zip(RANKS, (1, -1)):
        if row.get(column) is not None:
            try:
                numbers = [sign * float(value) for value in row[column]]
            except (TypeError, ValueError):
                raise BadRow(f"'{column}' is no list of numbers") from None
            if len(numbers) != count:
                raise BadRow(f"'{column}' has {len(numbers)} numbers for {count} answers")
            return numbers
    return [-float(at) for at in range(count)]


def label_of(row: dict[str, Any]) -> bool | None:
    """Whether the row's label says that its response is a good one; None without a label. Raises BadRow."""
    label = row.get("kto_tag") if row.get("label") is None else row["label"]
    known = {"true": True, "1": True, "1.0": True, "": None, "false": False, "0": False, "0.0": False, "-1": False}
    text = as_text(label, "label").strip().lower()
    if text not in known:
        raise BadRow(f"'label' is {text[:20]!r}, neither true nor false")
    return known[text]


def is_tied(row: dict[str, Any]) -> bool:
    """Whether the row's scores or its margin say that its two responses are equally good. Raises BadRow."""
    scores = [
        (row[one], row[other]) for one, other in SCORES if row.get(one) is not None and row.get(other) is not None
    ]
    if row.get("margin") is not None:
        scores.append((row["margin"], 0))
    try:
        return any(float(one) == float(other) for one, other in scores)
    except (TypeError, ValueError):
        raise BadRow("a score or margin is no number") from None
