"""The canonical records every data source is turned into, whatever its own columns were called.

A comparison can serve as a demonstration (its chosen answer), and both can serve as a prompt; the readers in
``common.data.layouts`` do that conversion. Texts carry no template, no cue and no surrounding white space:
``common.data.templates`` alone decides how a record is written out.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Union

Role = Literal["system", "user", "assistant"]
RECORD_KINDS = ("prompt", "demonstration", "comparison", "text")


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Prompt:
    """A dialogue that waits for the assistant: the last message is the user's.

    ``asked``: the user's messages one by one as the source has them, where ``messages`` joins several in a row; it
    takes no part in comparing prompts.
    """

    messages: tuple[Message, ...]
    asked: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self):
        if not self.messages or self.messages[-1].role != "user":
            raise ValueError("the last message of a prompt is the user's")

    @property
    def first_user_turn(self) -> str:
        """All that the user said before the first answer."""
        return next(message.content for message in self.messages if message.role == "user")


@dataclass(frozen=True)
class Demonstration:
    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Comparison:
    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PlainText:
    """Text without a dialogue, for the pretraining loss."""

    text: str


Record = Union[Prompt, Demonstration, Comparison, PlainText]


def user_turns(record: Record) -> tuple[str, ...]:
    """All that the user says, in order, by which dialogues are told apart (see `common.data.openings`); the text itself
    where there is no dialogue."""
    if isinstance(record, PlainText):
        return (record.text,)
    prompt = record if isinstance(record, Prompt) else record.prompt
    return prompt.asked or tuple(message.content for message in prompt.messages if message.role == "user")
