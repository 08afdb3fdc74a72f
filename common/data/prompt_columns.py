"""Builds the prompt of a row from its question column and the other columns that belong to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from common.data.dialogues import as_json, make_prompt, read_question
from common.data.records import Message, Prompt, Role
from common.data.values import BadRow, clean_text

COMPANIONS = ("context", "input", "document", "passage")  # put behind the question
SYSTEM = ("system_prompt", "system")
BESIDE = (*SYSTEM, *COMPANIONS, "history", "tools")


def prompt_in(row: dict[str, Any], column: str, companions: Sequence[str] = COMPANIONS) -> Prompt:
    """The prompt whose question is in `column`, with all that belongs to it. Raises BadRow."""
    return prompt_of(row, read_question(row[column], column), column, companions)


def prompt_of(
    row: dict[str, Any], messages: Sequence[Message], column: str, companions: Sequence[str] = COMPANIONS
) -> Prompt:
    """The prompt that ends with `messages`, with the row's history, system prompt, tools and companions.

    Args:
        column: where the messages are from, for errors.
        companions: the columns whose text is put behind the last question.

    Raises:
        BadRow: there is no question, or a column cannot be read.
    """
    messages = [*_history(row), *messages]
    added = _companions(row, companions)
    if added:
        last = max((at for at, message in enumerate(messages) if message.role == "user"), default=None)
        if last is None:
            raise BadRow(f"'{column}': no user's turn before the answer")
        question = messages[last].content
        # Some sets have the companion in the question too. It is taken to be there where it stands on lines of its own:
        # a short text may occur within a line of any question.
        added = [text for text in added if f"\n{text}\n" not in f"\n{question}\n"]
        messages[last] = replace(messages[last], content="\n\n".join(filter(None, (question, *added))))
    system = _system(row)
    if messages and messages[0] == Message("system", system):
        system = ""
    return make_prompt(messages, column, system, _tools(row))


def user_values_in(column: str, companions: Sequence[str] = COMPANIONS) -> Callable[[dict[str, Any]], list[Any]]:
    """The `Layout.user_values` of a layout whose question is in `column`."""
    return lambda row: [with_companions(row, row.get(column), companions)]


def with_companions(row: dict[str, Any], value: Any, companions: Sequence[str] = COMPANIONS) -> Any:
    """A value that holds the user's messages, together with the history and companions that belong to them."""
    if value is None or not (row.get("history") or any(row.get(column) for column in companions)):
        return value
    prompt = prompt_of(row, read_question(value, "prompt"), "prompt", companions)
    return [message for turn in prompt.user_messages for message in as_question(turn)]


def as_question(text: Any) -> list[dict[str, Any]]:
    """A user's message with this text, which is not read as a transcript even if it looks like one."""
    return [{"role": "user", "content": text}]


def _system(row: dict[str, Any]) -> str:
    return "\n\n".join(dict.fromkeys(filter(None, (clean_text(row.get(column), column) for column in SYSTEM))))


def _companions(row: dict[str, Any], companions: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(text for column in companions if (text := clean_text(row.get(column), column))))


def _history(row: dict[str, Any]) -> list[Message]:
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadRow("'history' is not a list of pairs, question and answer")
    roles: tuple[Role, Role] = "user", "assistant"
    return [Message(role, clean_text(text, "history")) for pair in pairs for role, text in zip(roles, pair)]


def _tools(row: dict[str, Any]) -> str:
    tools = row.get("tools") or ""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRow("'tools' is no JSON") from None
    if not tools or not isinstance(tools, list):
        if tools and not isinstance(tools, str):
            raise BadRow("'tools' is not a list")
        return ""
    return as_json(tools, "tools")
