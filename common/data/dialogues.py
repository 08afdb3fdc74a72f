"""Dialogues as data sets write them: one string with "Human:" and "Assistant:" cues, or a list of
role/content."""
from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

from common.data.records import Message, Prompt

_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_CUE = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_INLINE_CUE = re.compile(r"(?:\A|(?<=\s))(Human|Assistant):")
_BOTH_CUES = re.compile(r"\s*Human:.*\n\nAssistant:", re.S)


class BadRow(ValueError):
    """A row that cannot be used; the message says why, in a few words."""


def clean_text(value: Any, column: str) -> str:
    """``value`` without surrounding white space; '' for None. Raises BadRow if it is not text that can be
    encoded."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is not text but {type(value).__name__}")
    if "\0" in value:
        raise BadRow(f"'{column}' has NUL bytes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"'{column}' is invalid UTF-8") from None
    return value.strip()


def is_transcript(value: Any) -> bool:
    """Whether a text is a dialogue that begins with a "Human:" cue."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def is_whole_dialogue(value: Any) -> bool:
    """Whether a value holds a dialogue with its answer: a transcript with both cues, or a list of
    messages."""
    return isinstance(value, list) or (isinstance(value, str) and _BOTH_CUES.match(value) is not None)


def read_dialogue(value: Any, column: str) -> list[Message]:
    """The messages of a transcript or of a list of ``{'role', 'content'}`` or, as ShareGPT has them,
    ``{'from', 'value'}``; empty ones included.

    A cue counts where it opens the text or follows an empty line, since answers may quote the words. A text
    with no more than one such cue is read with cues after any white space, if its speakers then take turns.
    """
    if isinstance(value, list):
        return [_message(item, column) for item in value]
    text = clean_text(value, column)
    cues = list(_CUE.finditer(text))
    if len(cues) <= 1:
        inline = list(_INLINE_CUE.finditer(text))
        if all(cue[1] == ("Human", "Assistant")[turn % 2] for turn, cue in enumerate(inline)):
            cues = inline
    if not cues or cues[0].start() != 0:
        raise BadRow(f"'{column}' is no dialogue that begins with 'Human:'")
    ends = [cue.start() for cue in cues[1:]] + [len(text)]
    return [Message(_ROLES[cue[1]], text[cue.end():end].strip()) for cue, end in zip(cues, ends)]


def _message(item: Any, column: str) -> Message:
    if isinstance(item, dict) and {"role", "content"} <= item.keys():
        role, content = item["role"], item["content"]
    elif isinstance(item, dict) and {"from", "value"} <= item.keys():
        role, content = _SHAREGPT_ROLES.get(str(item["from"]), item["from"]), item["value"]
    else:
        raise BadRow(f"'{column}' holds something without 'role' and 'content', or 'from' and 'value'")
    if role not in ("system", "user", "assistant"):
        raise BadRow(f"'{column}' has the role {role!r}, not system, user or assistant")
    return Message(role, clean_text(content, column))


def read_prompt(value: Any, column: str, system: str = "") -> Prompt:
    """A prompt from a plain question, a transcript (with or without the last "Assistant:" cue) or a list of
    messages."""
    if isinstance(value, list) or is_transcript(value):
        messages = read_dialogue(value, column)
        if len(messages) > 1 and messages[-1] == Message("assistant", ""):
            messages.pop()
    else:
        messages = [Message("user", clean_text(value, column))]
    return make_prompt(messages, column, system)


def questions(value: Any) -> tuple[str, ...]:
    """The user's messages in a plain question, a transcript or a list of messages, as `make_prompt` keeps them,
    whatever is wrong with the rest; none if none can be read."""
    if isinstance(value, str):
        text = value.encode("utf-8", "replace").decode().replace("\0", "?")
        if not is_transcript(text):
            return tuple(filter(None, [text.strip()]))
        value = [{"role": message.role, "content": message.content} for message in read_dialogue(text, "")]
    found = []
    for item in value if isinstance(value, list) else ():
        with contextlib.suppress(BadRow):
            message = _message(item, "")
            if message.role == "user" and message.content:
                found.append(message.content)
    return tuple(found)


def read_answered(value: Any, column: str) -> tuple[list[Message], str]:
    """(everything before the last answer, that answer, which may be ''). Raises BadRow if it does not end
    with one."""
    *before, last = read_dialogue(value, column) or [Message("user", "")]
    if last.role != "assistant":
        raise BadRow(f"'{column}' does not end with an answer of the assistant")
    return before, last.content


def make_prompt(messages: Sequence[Message], column: str, system: str = "") -> Prompt:
    """The prompt made of ``messages``: a system message first, if any; empty messages left out; turns of one
    speaker in a row joined to one, as chat templates demand, with the user's kept one by one in `asked`.
    Raises BadRow if it does not end with the user's turn."""
    turns: list[Message] = []
    for message in [Message("system", system), *messages]:
        if not message.content:
            continue
        if turns and turns[-1].role == message.role:
            turns[-1] = Message(message.role, f"{turns[-1].content}\n\n{message.content}")
        else:
            turns.append(message)
    if not turns or turns[-1].role != "user":
        empty = not any(message.content for message in messages)
        raise BadRow(f"'{column}' is empty" if empty else f"'{column}': no user's turn before the answer")
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow(f"'{column}' has a system message after the first turn")
    asked = tuple(message.content for message in messages if message.role == "user" and message.content)
    return Prompt(tuple(turns), asked)
