"""Defines the canonical records that every data source is turned into, whatever its own columns are called.

A comparison can serve as a demonstration (its chosen response) and as feedback (to either response), and all can serve
as a prompt; the readers in `common.data.layouts` convert them. Texts contain no template and no cue. They have no
surrounding white space, except for the indentation of a response's first line. `common.data.templates` alone decides
how a record is written out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
RECORD_KINDS = ("prompt", "demonstration", "comparison", "feedback", "text")


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue.

    Attributes:
        role, content: who speaks, and the text.
        more: JSON with sorted keys of what the message has beside its text, '' for nothing: `reasoning_content`,
            `thinking`, `tool_calls`, `tool_call_id`, `name`. Only a chat template can write these.
        trained: False for a response that its row excludes from training. Comparing messages ignores it.
    """

    role: Role
    content: str
    more: str = ""
    trained: bool = field(default=True, compare=False, repr=False)


# A response is usually its text. Where text is not enough, it is a tuple of messages: one message with `more`, or
# several turns of which the first and the last are the assistant's.
Response = str | tuple[Message, ...]


def turns_of(response: Response) -> tuple[Message, ...]:
    """A response as messages."""
    return (Message("assistant", response),) if isinstance(response, str) else response


@dataclass(frozen=True)
class Prompt:
    """A dialogue that waits for the assistant: its last message is the user's, or the result of a tool.

    Attributes:
        messages: the turns; several messages of one speaker in a row are joined.
        user_messages: the user's messages one by one, as the source has them. Comparing prompts ignores them.
        tools: the tools that may be called, a JSON list of their schemas; '' for none.
    """

    messages: tuple[Message, ...]
    user_messages: tuple[str, ...] = field(default=(), compare=False, repr=False)
    tools: str = ""

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1].role not in ("user", "tool"):
            raise ValueError("the last message of a prompt is the user's or a tool's")

    @property
    def first_user_turn(self) -> str:
        """All that the user said before the first response."""
        return next(message.content for message in self.messages if message.role == "user")


@dataclass(frozen=True)
class Demonstration:
    prompt: Prompt
    response: Response


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        margin: the distance that the two scores should have, in raw scores; None where the data is not asked for it.
    """

    prompt: Prompt
    chosen: Response
    rejected: Response
    margin: float | None = None


@dataclass(frozen=True)
class Feedback:
    """
    Attributes:
        desirable: whether the response is a good one.
    """

    prompt: Prompt
    response: Response
    desirable: bool


@dataclass(frozen=True)
class PlainText:
    """Text without a dialogue, for the pretraining loss."""

    text: str


Record = Prompt | Demonstration | Comparison | Feedback | PlainText


def user_turns(record: Record) -> tuple[str, ...]:
    """All that the user says, in order; the text itself of a record without a dialogue.

    Splits tell dialogues apart by these turns, see `common.data.openings`.
    """
    if isinstance(record, PlainText):
        return (record.text,)
    prompt = record if isinstance(record, Prompt) else record.prompt
    return prompt.user_messages or tuple(message.content for message in prompt.messages if message.role == "user")
