"""The canonical records every data source is turned into, whatever its own columns were called.

A comparison can serve as a demonstration (its chosen answer), and both can serve as a prompt; the readers in
``common.data.layouts`` do that conversion. Texts carry no template and no cue, and no surrounding white space but
an answer's own indentation: ``common.data.templates`` alone decides how a record is written out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
RECORD_KINDS = ("prompt", "demonstration", "comparison", "text")


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue.

    ``more``: what a message has beside its text and only a chat template can write, as JSON with sorted keys:
    ``reasoning_content``, ``thinking``, ``tool_calls``, ``tool_call_id``, ``name``; '' for nothing. ``trained``:
    False for an answer that its row keeps from training; it takes no part in comparing messages.
    """

    role: Role
    content: str
    more: str = ""
    trained: bool = field(default=True, compare=False, repr=False)


# An answer is its text. Where that does not say all, it is messages, the first and the last of them the
# assistant's: one with `more` beside its text, or several turns.
Answer = str | tuple[Message, ...]


def turns_of(answer: Answer) -> tuple[Message, ...]:
    """An answer as messages."""
    return (Message("assistant", answer),) if isinstance(answer, str) else answer


@dataclass(frozen=True)
class Prompt:
    """A dialogue that waits for the assistant: the last message is the user's, or a tool's result.

    ``asked``: the user's messages one by one as the source has them, where ``messages`` joins several in a row; it
    takes no part in comparing prompts. ``tools``: the tools that may be called, a JSON list of their schemas; '' for
    none.
    """

    messages: tuple[Message, ...]
    asked: tuple[str, ...] = field(default=(), compare=False, repr=False)
    tools: str = ""

    def __post_init__(self):
        if not self.messages or self.messages[-1].role not in ("user", "tool"):
            raise ValueError("the last message of a prompt is the user's or a tool's")

    @property
    def first_user_turn(self) -> str:
        """All that the user said before the first answer."""
        return next(message.content for message in self.messages if message.role == "user")


@dataclass(frozen=True)
class Demonstration:
    prompt: Prompt
    response: Answer


@dataclass(frozen=True)
class Comparison:
    prompt: Prompt
    chosen: Answer
    rejected: Answer


@dataclass(frozen=True)
class PlainText:
    """Text without a dialogue, for the pretraining loss."""

    text: str


Record = Prompt | Demonstration | Comparison | PlainText


def user_turns(record: Record) -> tuple[str, ...]:
    """All that the user says, in order, by which dialogues are told apart (see `common.data.openings`); the text itself
    where there is no dialogue."""
    if isinstance(record, PlainText):
        return (record.text,)
    prompt = record if isinstance(record, Prompt) else record.prompt
    return prompt.asked or tuple(message.content for message in prompt.messages if message.role == "user")
