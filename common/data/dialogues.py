"""Dialogues as data sets write them: one string with "Human:" and "Assistant:" cues, or a list of
role/content."""

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
_SPEAKERS: dict[str, Role] = {  # by the names that public sets use, in any case
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
_CALLS = ("function_call", "tool_call")  # roles whose text is a call, as JSON
_SHAPES = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"), ("role", "text"))
_MORE = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "tool_call_id", "name")
_TRAINED = ("weight", "loss_weight", "train", "loss")  # say whether an answer is trained
_KEYS = frozenset(chain.from_iterable(_SHAPES))
_ANSWERS_OWN, _TOOLS_OWN = {*_MORE, *_TRAINED} - {"name", "tool_call_id"}, {"name", "tool_call_id", *_TRAINED}
_CUE = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_INLINE_CUE = re.compile(r"(?:\A|(?<=\s))(Human|Assistant):")
_BOTH_CUES = re.compile(r"\s*Human:.*\n\nAssistant:", re.S)


def is_transcript(value: Any) -> bool:
    """Whether a text is a dialogue that begins with a "Human:" cue."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def is_whole_dialogue(value: Any) -> bool:
    """Whether a value holds a dialogue with its answer: a transcript with both cues, or a list of
    messages."""
    return isinstance(value, (list, dict)) or (isinstance(value, str) and _BOTH_CUES.match(value) is not None)


def read_dialogue(value: Any, column: str) -> list[Message]:
    """The messages of a transcript, of a list of ``{'role', 'content'}`` or, as ShareGPT has them,
    ``{'from', 'value'}``, or of one of these alone; empty ones included.

    A cue counts where it opens the text or follows an empty line, since answers may quote the words. A text
    with no more than one such cue is read with cues after any white space, if its speakers then take turns.
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
    """The keys of a message that nothing is made of."""
    speaker = next((item[who] for who, _ in _SHAPES if who in item), None) if isinstance(item, dict) else None
    if speaker is not None:
        yield from item.keys() - _KEYS - _own_keys(_SPEAKERS.get(str(speaker).strip().lower(), "assistant"))


def _own_keys(role: str) -> set[str]:
    """The keys that a speaker's messages may have beside their text."""
    return _ANSWERS_OWN if role == "assistant" else _TOOLS_OWN if role == "tool" else set()


def _message(item: Any, column: str) -> Message:
    """One message of a list. Raises BadRow if it is none, or has a speaker that is not known."""
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
    """Whether a mark such as ``weight: 0`` or ``train: "False"`` keeps an answer from training."""
    text = str(value).strip().lower()
    try:
        return float(text) <= 0
    except ValueError:
        return text in ("false", "no")


def _spoken(item: Any, column: str) -> tuple[str, Any, dict[str, Any]]:
    """(speaker, text, what else the message says)."""
    for who, what in _SHAPES:
        # A message that is a call need not have any text.
        if isinstance(item, dict) and who in item and (what in item or any(key in item for key in _MORE)):
            return (
                str(item[who]).strip().lower(),
                item.get(what),
                {key: item[key] for key in _MORE if item.get(key) not in (None, "", [], {})},
            )
    raise BadRow(f"'{column}' holds something without 'role' and 'content', or 'from' and 'value'")


def _call(text: Any, column: str) -> dict[str, Any]:
    """A tool call out of the text of a turn that is one."""
    try:
        call = json.loads(as_text(text, column))
        return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadRow(f"'{column}' has a call that is no JSON object with 'name' and 'arguments'") from None


def as_json(value: Any, column: str) -> str:
    """A value as JSON with sorted keys. Raises BadRow if it cannot be written so."""
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
        text.encode("utf-8")
        return text
    except (TypeError, ValueError, RecursionError):  # lone surrogates are a ValueError
        raise BadRow(f"'{column}' has something that cannot be written as JSON") from None


def read_question(value: Any, column: str) -> list[Message]:
    """The messages of a plain question, a transcript (with or without the last "Assistant:" cue) or a list of
    messages."""
    if not isinstance(value, (list, dict)) and not is_transcript(value):
        return [Message("user", clean_text(value, column))]
    messages = read_dialogue(value, column)
    if len(messages) > 1 and messages[-1] == Message("assistant", ""):
        messages.pop()
    return messages


def read_prompt(value: Any, column: str, system: str = "") -> Prompt:
    """A prompt from what `read_question` reads."""
    return make_prompt(read_question(value, column), column, system)


def is_open(value: list) -> bool:
    """Whether a list of messages ends with something that the user says."""
    return bool(value) and bool(questions(value[-1:]))


def questions(value: Any) -> tuple[str, ...]:
    """The user's messages in a plain question, a transcript or a list of messages, as `make_prompt` keeps them,
    whatever is wrong with the rest; none if none can be read."""
    if isinstance(value, (bool, int, float)):
        value = as_text(value, "")
    if isinstance(value, str):
        text = value.encode("utf-8", "replace").decode().replace("\0", "?")
        if not is_transcript(text):
            return tuple(filter(None, [text.strip()]))
        value = [{"role": message.role, "content": message.content} for message in read_dialogue(text, "")]
    found = []
    for item in value if isinstance(value, list) else [value] if isinstance(value, dict) else ():
        with contextlib.suppress(BadRow):
            message = _message(item, "")
            if message.role == "user" and message.content:
                found.append(message.content)
    return tuple(found)


def response_of(messages: Sequence[Message]) -> Response:
    """Messages as an answer: their text alone where there is one message that has nothing else."""
    if len(messages) == 1 and not messages[0].more:
        return messages[0].content
    return tuple(messages)


def joined(messages: Sequence[Message]) -> list[Message]:
    """Without empty messages, and with turns of one speaker in a row joined to one, as chat templates demand."""
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
    """The prompt made of ``messages``: a system message first, if any, and turns as `joined` makes them, with the
    user's kept one by one in `user_messages`. Raises BadRow unless it ends with a turn of the user or of a tool."""
    turns = joined([Message("system", system), *messages])
    user_messages = tuple(message.content for message in messages if message.role == "user" and message.content)
    if not turns or not user_messages or turns[-1].role not in ("user", "tool"):
        empty = not any(message.content for message in messages)
        raise BadRow(f"'{column}' is empty" if empty else f"'{column}': no user's turn before the answer")
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow(f"'{column}' has a system message after the first turn")
    return Prompt(tuple(turns), user_messages, tools)
