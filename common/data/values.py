"""Reads single values of a row, and decides what counts as text."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

# Letters and symbols that are invisible, though Unicode does not classify them as formatting.
_BLANK = frozenset("\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_UNSEEN = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"})  # controls, formatting, spaces, marks on no letter


class BadRow(ValueError):
    """A row that cannot be used; the message says why in a few words."""


def as_text(value: Any, column: str) -> str:
    """`value` as it stands; '' for None and for text of invisible characters only.

    A number or truth value is written as JSON writes it, and the text parts of a list such as
    `[{'type': 'text', 'text': ...}]` are joined. Raises BadRow if it is not text that can be encoded.
    """
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        value = json.dumps(value)
    elif _is_parts(value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is not text but {type(value).__name__}")
    if "\0" in value:
        raise BadRow(f"'{column}' has NUL bytes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"'{column}' is invalid UTF-8") from None
    return value if is_visible(value) else ""


def clean_text(value: Any, column: str) -> str:
    """`as_text` without surrounding white space."""
    return as_text(value, column).strip()


def clean_response(value: Any, column: str) -> str:
    """`as_text` of a response: without blank lines before it and white space behind it.

    One space before the first word is dropped too, since some sets separate a response from the cue by it. Indentation
    of more spaces stays, since it belongs to code.
    """
    return own_indentation(as_text(value, column))


def own_indentation(text: str) -> str:
    """A text as `clean_response` returns it."""
    first = len(text) - len(text.lstrip())
    text = text[text.rfind("\n", 0, first) + 1 :].rstrip()
    return text[1:] if text[:1] == " " and text[1:2].strip() else text


def margin_of(value: Any, column: str) -> float:
    """The wanted distance of a pair's scores: a number of 0 or more, or its text. Raises BadRow."""
    if value is None or value == "":
        raise BadRow(f"'{column}' is missing")
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise BadRow(f"'{column}' is no number")
    if margin < 0:
        raise BadRow(f"'{column}' is below 0")
    return margin


def is_visible(text: str) -> bool:
    """Whether a text has a visible character; zero-width spaces, marks of direction and the like are invisible."""
    return any(char not in _BLANK and unicodedata.category(char) not in _UNSEEN for char in text)


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts or numbers; some of them may be None."""
    return (
        isinstance(value, list)
        and {type(item) for item in value} - {type(None)} != set()
        and all(item is None or isinstance(item, (str, int, float)) for item in value)
    )


def are_several(value: Any) -> bool:
    """Whether a value is several responses: a list of texts, or of lists of messages."""
    return is_texts(value) or isinstance(value, list) and bool(value) and all(isinstance(item, list) for item in value)


def _is_parts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in value
        )
    )
