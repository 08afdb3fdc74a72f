"""Reads dialogues: strings with "Human:" and "Assistant:" cues, or lists of messages with role and content."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from common.data.records import Message, Prompt, Response, Role
from common.data.values import BadRow, as_text, clean_response, clean_text, own_indentation

_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_SPEAKERS: dict[str, Role] = {  # the names that public sets use; upper and lower case are the same
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "person": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_CALLS = ("function_call", "tool_call")  # roles whose text is a call in JSON
_SHAPES = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"), ("role", "text"))
_MORE = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "tool_call_id", "name")
_TRAINED = ("weight", "loss_weight", "train", "loss")  # say whether a response is trained
_KEYS = frozenset(chain.from_iterable(_SHAPES))
_RESPONSE_KEYS, _TOOL_KEYS = {*_MORE, *_TRAINED} - {"name", "tool_call_id"}, {"name", "tool_call_id", *_TRAINED}
_CUE = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_INLINE_CUE = re.compile(r"(?:\A|(?<=\s))(Human|Assistant):")
_BOTH_CUES = re.compile(r"\s*Human:.*\n\nAssistant:", re.S)


def is_transcript(value: Any) -> bool:
    """Whether a text is a dialogue that begins with a "Human:" cue."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def is_whole_dialogue(value: Any) -> bool:
    """Whether a value is a dialogue with its response: a transcript with both cues, or a list of messages."""
    return isinstance(value, (list, dict)) or (isinstance(value, str) and _BOTH_CUES.match(value) is not None)


def read_dialogue(value: Any, column: str) -> list[Message]:
    """The messages of a dialogue, empty ones included. Raises BadRow if it cannot be read.

    Args:
        value: a transcript, or a list of `{'role', 'content'}` or `{'from', 'value'}` (as ShareGPT has them), or a
            single one of these.
        column: where the value is from, for errors.

    In a transcript a cue counts at the start of the text and after an empty line, since responses may quote the words.
    A text with at most one such cue is read with cues after any white space, if its speakers then take turns.
    """
    if isinstance(value, (list, dict)):
        return [_message(item, column) for item in (value if isinstance(value, list) else [value])]
    text = as_text(value, column).rstrip()
    cues = list(_CUE.finditer(text))
    if len(cues) <= 1:
        inline = list(_INLINE_CUE.finditer(text))
        if all(cue[1] == ("Human", "Assistant")[turn % 2] for turn, cue in enumerate(inline)):
            cues = inline
    if not cues or text[: cues[0].start()].strip():
        raise BadRow(f"'{column}' is no dialogue that begins with 'Human:'")
    ends = [cue.start() for cue in cues[1:]] + [len(text)]
    spoken = [(_ROLES[cue[1]], text[cue.end() : end]) for cue, end in zip(cues, ends)]
    return [Message(role, own_indentation(said) if role == "assistant" else said.strip()) for role, said in spoken]


def unused_keys(item: Any) -> Iterator[str]:
    """The keys of a message that no record uses."""
    speaker = next((item[who] for who, _ in _SHAPES if who in item), None) if isinstance(item, dict) else None
    if speaker is not None:
        yield from item.keys() - _KEYS - _own_keys(_SPEAKERS.get(str(speaker).strip().lower(), "assistant"))


def _own_keys(role: str) -> set[str]:
    """The keys that messages of a role may have beside their text."""
    return _RESPONSE_KEYS if role == "assistant" else _TOOL_KEYS if role == "tool" else set()


def _message(item: Any, column: str) -> Message:
    """One message of a list. Raises BadRow if it is no message, or its speaker is unknown."""
    speaker, content, more = _spoken(item, column)
    if speaker in _CALLS:
        speaker, content, more["tool_calls"] = "assistant", None, [_call(content, column)]
    role = _SPEAKERS.get(speaker)
    if role is None:
        raise BadRow(f"'{column}' has the role {speaker!r}; known are {', '.join(_SPEAKERS)}")
    more = {key: value for key, value in more.items() if key in _own_keys(role)}
    if "function_call" in more:
        more.setdefault("tool_calls", [{"type": "function", "function": more.pop("function_call")}])
    if "reasoning" in more:
        more.setdefault("reasoning_content", more.pop("reasoning"))
    for key in ("reasoning_content", "thinking"):
        if key in more and not (text := clean_text(more[key], f"{column}: {key}")):
            del more[key]
        elif key in more:
            more[key] = text
    text = (clean_response if role == "assistant" else clean_text)(content, column)
    trained = not any(_is_no(item.get(key)) for key in _TRAINED)
    return Message(role, text, as_json(more, column) if more else "", trained)


def _is_no(value: Any) -> bool:
    """Whether a value such as in `weight: 0` or `train: "False"` excludes a response from training."""
    text = str(value).strip().lower()
    try:
        return float(text) <= 0
    except ValueError:
        return text in ("false", "no")


def _spoken(item: Any, column: str) -> tuple[str, Any, dict[str, Any]]:
    """(speaker, text, the other keys of the message that have a value)."""
    for who, what in _SHAPES:
        # A message with a tool call may have no text.
        if isinstance(item, dict) and who in item and (what in item or any(key in item for key in _MORE)):
            return (
                str(item[who]).strip().lower(),
                item.get(what),
                {key: item[key] for key in _MORE if item.get(key) not in (None, "", [], {})},
            )
    raise BadRow(f"'{column}' holds something without 'role' and 'content', or 'from' and 'value'")


def _call(text: Any, column: str) -> dict[str, Any]:
    """A tool call, read from the text of a turn that consists of it."""
    try:
        call = json.loads(as_text(text, column))
        return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadRow(f"'{column}' has a call that is no JSON object with 'name' and 'arguments'") from None


def as_json(value: Any, column: str) -> str:
    """A value as JSON with sorted keys. Raises BadRow if it cannot be written as JSON."""
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
        text.encode("utf-8")
        return text
    except (TypeError, ValueError, RecursionError):  # lone surrogates are a ValueError
        raise BadRow(f"'{column}' has something that cannot be written as JSON") from None


def read_question(value: Any, column: str) -> list[Message]:
    """The messages of a plain question, of a transcript (with or without the last "Assistant:" cue) or of a list of
    messages."""
    if not isinstance(value, (list, dict)) and not is_transcript(value):
        return [Message("user", clean_text(value, column))]
    messages = read_dialogue(value, column)
    if len(messages) > 1 and messages[-1] == Message("assistant", ""):
        messages.pop()
    return messages


def read_prompt(value: Any, column: str, system: str = "") -> Prompt:
    """The prompt made of what `read_question` reads."""
    return make_prompt(read_question(value, column), column, system)


def is_open(value: list) -> bool:
    """Whether a list of messages ends with a message of the user."""
    return bool(value) and bool(questions(value[-1:]))


def questions(value: Any) -> tuple[str, ...]:
    """The user's messages in a plain question, a transcript or a list of messages, as `Prompt.user_messages` has them.

    What cannot be read is skipped.
    """
    if isinstance(value, (bool, int, float)):
        value = as_text(value, "")
    if isinstance(value, str):
        text = value.encode("utf-8", "replace").decode().replace("\0", "?")
        if not is_transcript(text):
            return tuple(filter(None, [text.strip()]))
        value = [{"role": message.role, "content": message.content} for message in read_dialogue(text, "")]
    contents = []
    for item in value if isinstance(value, list) else [value] if isinstance(value, dict) else ():
        with contextlib.suppress(BadRow):
            message = _message(item, "")
            if message.role == "user" and message.content:
                contents.append(message.content)
    return tuple(contents)


def response_of(messages: Sequence[Message]) -> Response:
    """Messages as a response: a single message without anything beside its text becomes that text."""
    if len(messages) == 1 and not messages[0].more:
        return messages[0].content
    return tuple(messages)


def joined(messages: Sequence[Message]) -> list[Message]:
    """The messages without empty ones, and with several of one speaker in a row joined, as chat templates demand."""
    turns: list[Message] = []
    for message in messages:
        if not message.content and not message.more:
            continue
        last = turns[-1] if turns else None
        if (
            last
            and last.role == message.role != "tool"
            and not last.more
            and not message.more
            and last.trained == message.trained
        ):
            turns[-1] = replace(message, content=f"{last.content}\n\n{message.content}")
        else:
            turns.append(message)
    return turns


def make_prompt(messages: Sequence[Message], column: str, system: str = "", tools: str = "") -> Prompt:
    """The prompt made of `messages`, joined as by `joined`, after the `system` message if there is one.

    Raises:
        BadRow: the last turn is not one of the user or of a tool.
    """
    turns = joined([Message("system", system), *messages])
    user_messages = tuple(message.content for message in messages if message.role == "user" and message.content)
    if not turns or not user_messages or turns[-1].role not in ("user", "tool"):
        empty = not any(message.content for message in messages)
        raise BadRow(f"'{column}' is empty" if empty else f"'{column}': no user's turn before the answer")
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow(f"'{column}' has a system message after the first turn")
    return Prompt(tuple(turns), user_messages, tools)
