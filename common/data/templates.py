"""The wording around a dialogue: which text asks the model, and which text follows as its answer.

A template renders a prompt up to and including the cue after which the assistant speaks, and joins an answer
to that cue by its `lead`. The end token is no part of a template; it belongs to the codec.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jinja2.exceptions import TemplateError

from common.data.records import Prompt
from common.errors import UserError


class Template(Protocol):
    name: str
    lead: str  # what stands between the assistant's cue and an answer

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt, up to and including the assistant's cue."""

    def response_text(self, text: str) -> str:
        """An answer as it follows the cue."""


@dataclass(frozen=True)
class TextTemplate:
    """Plain text, the same for every tokenizer: blocks with a blank line between them.

    A system prompt is a block of its own at the start; without one the dialogue starts with `opening`, if
    there is any ("" puts a blank line before the first question).
    """

    name: str
    question: str
    cue: str
    lead: str
    opening: str | None = None

    def prompt_text(self, prompt: Prompt) -> str:
        blocks = [] if self.opening is None or prompt.messages[0].role == "system" else [self.opening]
        wrapping = {"system": "", "user": self.question, "assistant": self.cue + self.lead}
        blocks += [wrapping[message.role] + message.content for message in prompt.messages]
        return "\n\n".join([*blocks, self.cue])

    def response_text(self, text: str) -> str:
        return self.lead + text


class ChatTemplate:
    """The chat template that came with a tokenizer.

    The lead, and whether the template trims answers, are read off a rendered probe: a chat template is a
    program and can be asked nothing else.

    Raises:
        UserError: the tokenizer has no chat template, or one whose answers do not continue its own prompts.
    """

    name = "chat"
    _PROBE = "\tprobe\t"

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("--template chat: the tokenizer has no chat template; choose one of "
                            f"{', '.join(sorted(_TEXT_TEMPLATES))}")
        self._tokenizer = tokenizer
        question = [{"role": "user", "content": "question"}]
        asked = self._apply(question, tokenize=False, add_generation_prompt=True)
        answered = self._apply([*question, {"role": "assistant", "content": self._PROBE}], tokenize=False)
        answer = answered[len(asked):]
        if not answered.startswith(asked) or self._PROBE.strip() not in answer:
            raise UserError("--template chat: the tokenizer's chat template does not render an answer as the "
                            f"continuation of its prompt; choose one of {', '.join(sorted(_TEXT_TEMPLATES))}")
        self._trims = self._PROBE not in answer
        self.lead = answer[:answer.index(self._PROBE.strip() if self._trims else self._PROBE)]

    def prompt_text(self, prompt: Prompt) -> str:
        return self._apply(_as_dicts(prompt), tokenize=False, add_generation_prompt=True)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The rendered prompt as ids. Special tokens are the template's own; users' are text."""
        return self._apply(_as_dicts(prompt), tokenize=True, add_generation_prompt=True, return_dict=False,
                           sanitize_control_tokens=True)

    def response_text(self, text: str) -> str:
        return self.lead + (text.strip() if self._trims else text)

    def _apply(self, messages: list[dict[str, str]], **options):
        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, ValueError) as error:
            raise UserError(f"--template chat: the tokenizer's chat template refuses a dialogue of the roles "
                            f"{', '.join(message['role'] for message in messages)}: {error}") from None


def _as_dicts(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


_TEXT_TEMPLATES = {template.name: template for template in (
    # The layout of Anthropic's HH-RLHF transcripts.
    TextTemplate("human_assistant", question="Human: ", cue="Assistant:", lead=" ", opening=""),
    TextTemplate("question_answer", question="Question: ", cue="Answer:", lead=" "),
    # Stanford Alpaca's prompt for an instruction without a separate input, as its README documents it;
    # further turns repeat the two headings, and a system prompt takes the place of the opening line.
    TextTemplate("alpaca", question="### Instruction:\n", cue="### Response:", lead="\n",
                 opening="Below is an instruction that describes a task. "
                         "Write a response that appropriately completes the request."),
)}

TEMPLATE_NAMES = (*_TEXT_TEMPLATES, ChatTemplate.name)


def get_template(name: str, tokenizer=None) -> Template:
    """The template called `name`; `chat` is made from the `tokenizer` it belongs to.

    Raises:
        UserError: no such template, or `chat` with a tokenizer that has none that can be used.
    """
    if name == ChatTemplate.name:
        return ChatTemplate(tokenizer)
    if name not in _TEXT_TEMPLATES:
        raise UserError(f"--template {name}: no such template; choose one of {', '.join(TEMPLATE_NAMES)}")
    return _TEXT_TEMPLATES[name]
