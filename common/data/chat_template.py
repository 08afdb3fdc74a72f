"""Uses the chat template of a tokenizer as a template of this package.

A chat template is a program that can only render a dialogue. Therefore what it puts around a response is read off
renderings of probes, and its rendering of each row is checked for what the row says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from common.data.errors import TemplateError
from common.data.records import Message, Prompt, Response, turns_of
from common.data.templates import CHAT, TEXT_TEMPLATES, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = "2025-01-01"  # the date that a template writes, unless another is given
_PROBE = "\tprobe\t"
_QUESTION = Prompt((Message("user", "question"),))
# Marks around control tokens in a user's text while a dialogue is rendered. Unicode reserves both code points for use
# within programs, so that no text contains them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_TIME = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])((?:(?!\1).)*)\1\s*\)""", re.S)
_MARKED, _TORN = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}"), re.compile(f"[{_OPEN}{_CLOSE}]")


class ChatTemplate:
    """The chat template of `tokenizer`.

    Args:
        date: YYYY-MM-DD, the date that the template takes for today; the time is midnight.

    Attributes: see `templates.Template`.

    Raises:
        TemplateError: the tokenizer has no chat template, or one whose responses do not continue its own prompts.
    """

    name = CHAT

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, date: str = DATE):
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise TemplateError(
                CHAT, f"the tokenizer has no chat template; choose one of {', '.join(sorted(TEXT_TEMPLATES))}"
            )
        self._tokenizer = tokenizer
        self._controls = re.compile("|".join(map(re.escape, sorted(control_tokens(tokenizer), key=len, reverse=True))))
        self.date, self._now = date, datetime.fromisoformat(date)
        self._last: tuple[Prompt | None, str] = (None, "")
        prompt_text = self._render(_QUESTION, cue=True)
        if self._render(_QUESTION, cue=True) != prompt_text:
            raise TemplateError(
                CHAT,
                "the tokenizer's chat template renders the same dialogue differently from "
                f"one time to the next; choose one of {', '.join(sorted(TEXT_TEMPLATES))}",
            )
        answered = self._render(_QUESTION, [Message("assistant", _PROBE)])
        at = answered.find(_PROBE.strip(), len(prompt_text))
        if not answered.startswith(prompt_text) and answered.startswith(re.sub(r"<think>\s*$", "", prompt_text)):
            raise TemplateError(
                CHAT,
                "the tokenizer's chat template opens a reasoning block, <think>, where it "
                "asks for an answer, but renders answers without: take that out of its generation prompt, "
                f"or choose one of {', '.join(sorted(TEXT_TEMPLATES))}",
            )
        if not answered.startswith(prompt_text) or at < 0:
            raise TemplateError(
                CHAT,
                "the tokenizer's chat template does not render an answer as the "
                f"continuation of its prompt; choose one of {', '.join(sorted(TEXT_TEMPLATES))}",
            )
        end = at + len(_PROBE.strip())
        if answered[at - 1 : end + 1] == _PROBE:  # else the template trims responses
            at, end = at - 1, end + 1
        self.lead, self._close = answered[len(prompt_text) : at], answered[end:]
        match = self._controls.search(self._close)
        self.end_token = match[0] if match else None
        self.tail = self._close[: match.start()] if match else ""
        templates = tokenizer.chat_template
        self.dated = any(map(_TIME.search, templates.values() if isinstance(templates, dict) else [templates]))

    def prompt_text(self, prompt: Prompt) -> str:
        """The rendered prompt, up to and including the assistant's cue."""
        return _unmarked(self._rendered_prompt(prompt))

    def response_text(self, response: Response, prompt: Prompt | None = None) -> str:
        """The rendered response, up to its end token."""
        return "".join(piece.text for piece in self.response_pieces(response, prompt))

    def prompt_pieces(self, prompt: Prompt) -> list[Piece]:
        return _pieces(self._rendered_prompt(prompt))

    def response_pieces(self, response: Response, prompt: Prompt | None = None) -> list[Piece]:
        prompt = prompt or _QUESTION
        turns = turns_of(response)
        prompt_text, dialogue_text = self._rendered_prompt(prompt), self._render(prompt, turns)
        if not dialogue_text.startswith(prompt_text):
            raise TemplateError(
                CHAT,
                "the tokenizer's chat template does not render this answer as the "
                f"continuation of its prompt, of the roles {_roles(prompt.messages)}",
            )
        if not dialogue_text.endswith(self._close):
            raise TemplateError(
                CHAT,
                "the tokenizer's chat template ends this answer otherwise than a plain "
                f"one, with something else than {self._close!r}",
            )
        text = dialogue_text[len(prompt_text) : len(dialogue_text) - len(self._close)] + self.tail
        self._check_response(turns[-1], text)
        self._check_written([turn for turn in turns if turn.role != "assistant"], text)
        return _pieces(text)

    def _rendered_prompt(self, prompt: Prompt) -> str:
        """The rendering of a prompt, with the control tokens in users' texts marked. The last one is cached."""
        if self._last[0] != prompt:
            text = self._render(prompt, cue=True)
            self._check_written(prompt.messages, text)
            for tool in _names(json.loads(prompt.tools or "[]")):
                self._check(tool in text, "tools")
            self._last = prompt, text
        return self._last[1]

    def _check_written(self, messages: Iterable[Message], text: str) -> None:
        for message in messages:
            if message.role != "assistant":
                content = self._mark(message.content).strip()
                self._check(
                    content in text
                    or json.dumps(content)[1:-1] in text
                    or json.dumps(content, ensure_ascii=False)[1:-1] in text,
                    f"{message.role} turns",
                )
            for call in _names(_more(message).get("tool_calls", [])):
                self._check(call in text, "tool_calls")

    def _check_response(self, response: Message, text: str) -> None:
        # Some templates separate the reasoning from a response, and write, move or drop it by rules of their own.
        for part in re.split("</?think>", self._mark(response.content)):
            self._check(part.strip() in text, "a part of this answer, such as its reasoning")
        more = _more(response)
        for key in ("reasoning_content", "thinking"):
            self._check(self._mark(more.get(key, "")).strip() in text, key)
        for call in _names(more.get("tool_calls", [])):
            self._check(call in text, "tool_calls")

    def _check(self, written: bool, what: str) -> None:
        if not written:
            raise TemplateError(
                CHAT,
                f"the tokenizer's chat template leaves out {what}: use one that writes "
                "them, or take them out of the data",
            )

    def _render(self, prompt: Prompt, turns: Iterable[Message] = (), *, cue: bool = False) -> str:
        messages = [*prompt.messages, *turns]
        tools = self._marked(json.loads(prompt.tools)) if prompt.tools else None
        try:
            rendered = self._tokenizer.apply_chat_template(
                [self._as_dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=cue,
                tools=tools,
                chat_template=at_time(self._tokenizer.get_chat_template(tools=tools), self._now),
            )
            return cast(str, rendered)
        except TemplateError:
            raise
        except Exception as error:  # a template is a program, which may raise anything
            raise TemplateError(
                CHAT, f"the tokenizer's chat template refuses a dialogue of the roles {_roles(messages)}: {error}"
            ) from None

    def _as_dict(self, message: Message) -> dict:
        more = self._marked(_more(message))
        for call in more.get("tool_calls", []):  # templates want the arguments as an object
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                try:
                    function["arguments"] = json.loads(function["arguments"])
                except ValueError:
                    pass
        return {"role": message.role, "content": self._mark(message.content), **more}

    def _mark(self, text: str) -> str:
        """`text` with marks around its control tokens, which tell them from those of the template."""
        return self._controls.sub(f"{_OPEN}\\g<0>{_CLOSE}", _unmarked(text)) if self._controls.pattern else text

    def _marked(self, value: Any) -> Any:
        """A JSON value with `_mark` applied to all its texts."""
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, list):
            return [self._marked(item) for item in value]
        if isinstance(value, dict):
            return {self._mark(key): self._marked(item) for key, item in value.items()}
        return value


@lru_cache
def at_time(chat_template: str, now: datetime) -> str:
    """The template with `now` written in where it asks for the present time.

    Raises:
        TemplateError: it asks for the time in a way that is not understood.
    """
    fixed = _TIME.sub(lambda call: json.dumps(now.strftime(call[2]), ensure_ascii=False), chat_template)
    if re.search(r"\bstrftime_now\b(?!\s+is\s+(?:not\s+)?defined)", fixed):
        raise TemplateError(
            CHAT,
            "the tokenizer's chat template writes the present time by a format that it "
            "makes up itself, so no two runs would have the same prompts: write the format into the "
            "template, or remove the time",
        )
    return fixed


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The tokens that control a model, which no user's text may turn into.

    These are the special tokens, and the added tokens that the chat template writes around turns. Markup that responses
    contain, such as <think> and </think>, is not among them.
    """
    template, added = str(getattr(tokenizer, "chat_template", None) or ""), tokenizer.added_tokens_decoder
    contents = {token.content for token in added.values()}
    controls = {
        token.content
        for token in added.values()
        if token.special
        or token.content.strip()
        and token.content in template
        and not _is_markup(token.content, contents)
    }
    return controls | {token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token}


def _is_markup(token: str, tokens: set[str]) -> bool:
    name = re.fullmatch(r"</?([\w.-]+)>", token)
    return name is not None and {f"<{name[1]}>", f"</{name[1]}>"} <= tokens


def _roles(messages: Iterable[Message]) -> str:
    return ", ".join(message.role for message in messages)


def _pieces(marked: str) -> list[Piece]:
    """Marked text as pieces: what stands between two marks is a user's, the rest is raw.

    A template may separate a mark from its partner, by cutting a text. The text is split at such a mark, so that the
    characters around it do not join to a token.
    """
    return [
        Piece(text, at % 2 == 0) for at, part in enumerate(_MARKED.split(marked)) for text in _TORN.split(part) if text
    ]


def _unmarked(text: str) -> str:
    return _TORN.sub("", text)


def _more(message: Message) -> dict:
    return json.loads(message.more) if message.more else {}


def _names(items: Iterable) -> list[str]:
    """The names of the functions in a list of tools or of calls."""
    functions = [item.get("function", item) if isinstance(item, dict) else item for item in items]
    return [str(function["name"]) for function in functions if isinstance(function, dict) and "name" in function]
