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

    ``opening``: the user's first message as the source has it, where ``messages`` joins it with the next
    ones; it takes no part in comparing prompts.
    """

    messages: tuple[Message, ...]
    opening: str | None = field(default=None, compare=False, repr=False)

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


def identity(record: Record) -> str:
    """The text by which a record is assigned to a phase and kept or dropped by a blend's weight:
    the user's first message, or the text itself where there is no dialogue."""
    if isinstance(record, PlainText):
        return record.text
    prompt = record if isinstance(record, Prompt) else record.prompt
    return prompt.first_user_turn if prompt.opening is None else prompt.opening
