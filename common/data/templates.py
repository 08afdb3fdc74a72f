"""Writes a prompt and a response as text, in the wording of a template.

A template renders a prompt up to and including the cue after which the assistant speaks, and joins a response to that
cue by its `lead`. It returns pieces, which keep text of users apart from special tokens of the template: both may look
the same. `common.data.chat_template` has the templates that come with tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from common.data.errors import TemplateError
from common.data.records import Message, Prompt, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Piece(NamedTuple):
    """A part of a text. In a `raw` one, what looks like a special token is one."""

    text: str
    raw: bool


class Template(Protocol):
    """What every template has; all of it is only read.

    Attributes:
        name: one of `TEMPLATE_NAMES`.
        lead: text between the assistant's cue and a response.
        tail: text between a response and its end token.
        end_token: the token that ends a response, if the template has one of its own.
        dated: whether the template writes the date into prompts.
        date: the date that it writes then, YYYY-MM-DD.
    """

    @property
    def name(self) -> str: ...
    @property
    def lead(self) -> str: ...
    @property
    def tail(self) -> str: ...
    @property
    def end_token(self) -> str | None: ...
    @property
    def dated(self) -> bool: ...
    @property
    def date(self) -> str: ...

    def prompt_pieces(self, prompt: Prompt) -> list[Piece]:
        """The prompt, up to and including the assistant's cue. Raises TemplateError if the template cannot write it."""

    def response_pieces(self, response: Response, prompt: Prompt | None = None) -> list[Piece]:
        """A response as it follows the cue of its prompt (None: of any prompt), up to its end token. Raises
        TemplateError if the template cannot write it."""


@dataclass(frozen=True)
class TextTemplate:
    """Plain text, the same for every tokenizer: one block per message, joined by `between`.

    Attributes:
        question: stands before each user's message.
        cue: after it the assistant speaks.
        lead: stands between the cue and a response.
        opening: the first block of a dialogue without a system prompt; "" puts a blank line before the first question,
            None nothing. A system prompt is a block of its own.
        between: stands between blocks.
        raw: whether what looks like a special token in a text is one.
    """

    name: str
    question: str
    cue: str
    lead: str
    opening: str | None = None
    between: str = "\n\n"
    raw: bool = False
    tail: ClassVar[str] = ""
    date: ClassVar[str] = ""
    end_token: ClassVar[str | None] = None
    dated: ClassVar[bool] = False

    def prompt_text(self, prompt: Prompt) -> str:
        blocks = [] if self.opening is None or prompt.messages[0].role == "system" else [self.opening]
        if prompt.tools:
            raise self._cannot_write("tools")
        blocks += [self._block(message) for message in prompt.messages]
        return self.between.join([*blocks, self.cue])

    def response_text(self, response: Response) -> str:
        """A response as it follows the cue."""
        if isinstance(response, str):
            return self.lead + response
        text = self.between.join(map(self._block, response))
        return text.removeprefix(self.cue)

    def prompt_pieces(self, prompt: Prompt) -> list[Piece]:
        return [Piece(self.prompt_text(prompt), self.raw)]

    def response_pieces(self, response: Response, prompt: Prompt | None = None) -> list[Piece]:
        return [Piece(self.response_text(response), self.raw)]

    def _block(self, message: Message) -> str:
        wrapping = {"system": "", "user": self.question, "assistant": self.cue + self.lead}
        if message.more or message.role not in wrapping:
            raise self._cannot_write(message.more.split('"')[1] if message.more else "turns of a tool")
        return wrapping[message.role] + message.content

    def _cannot_write(self, what: str) -> TemplateError:
        return TemplateError(
            self.name,
            f"it cannot write {what}: use the template chat with a tokenizer whose chat template can, or leave that "
            "out of the data",
        )


TEXT_TEMPLATES = {
    template.name: template
    for template in (
        # The layout of Anthropic's HH-RLHF transcripts.
        TextTemplate("human_assistant", question="Human: ", cue="Assistant:", lead=" ", opening=""),
        TextTemplate("question_answer", question="Question: ", cue="Answer:", lead=" "),
        # Stanford Alpaca's prompt for an instruction without a separate input, as its README documents it;
        # further turns repeat the two headings, and a system prompt takes the place of the opening line.
        TextTemplate(
            "alpaca",
            question="### Instruction:\n",
            cue="### Response:",
            lead="\n",
            opening="Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.",
        ),
        # For text that has been rendered already, or that the model continues as it stands.
        TextTemplate("none", question="", cue="", lead="", between="", raw=True),
    )
}

CHAT = "chat"
TEMPLATE_NAMES = ("human_assistant", "question_answer", "alpaca", CHAT, "none")

# What common templates put around turns. Text that contains these has been rendered by one.
_MARKS = re.compile(
    r"\n\n(?:Human|Assistant):|<\|im_(?:start|end)\|>|\[/?INST\]|<\|(?:start_header_id|eot_id)\|>|"
    r"<(?:start|end)_of_turn>|^### (?:Instruction|Response):|<\|(?:user|assistant|system|end)\|>",
    re.M,
)


def marks(text: str) -> Iterator[str]:
    """The marks of templates in a text, which should have none."""
    return (match[0].strip() for match in _MARKS.finditer(text))


def get_template(name: str, tokenizer: PreTrainedTokenizerBase | None = None, date: str | None = None) -> Template:
    """The template called `name`; `chat` is made from the `tokenizer` it belongs to, see `ChatTemplate`.

    Raises:
        TemplateError: no such template, or `chat` with a tokenizer that has none that can be used.
    """
    if name == CHAT:
        from common.data.chat_template import ChatTemplate

        return ChatTemplate(tokenizer, *([date] if date else []))
    if name not in TEXT_TEMPLATES:
        raise TemplateError(name, f"no such template; choose one of {', '.join(TEMPLATE_NAMES)}")
    return TEXT_TEMPLATES[name]
