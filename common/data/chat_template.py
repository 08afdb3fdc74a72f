"""The chat template that came with a tokenizer, as a template of this package.

A chat template is a program and can be asked nothing else than to render: what it puts around an answer is read off
renderings of probes, and what it makes of each row is checked against what the row says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache

from common.data.errors import TemplateError
from common.data.records import Answer, Message, Prompt, turns_of
from common.data.templates import CHAT, TEXT_TEMPLATES, Piece

DATE = "2025-01-01"  # what a template that writes the date writes, unless another is given
_PROBE = "\tprobe\t"
_QUESTION = Prompt((Message("user", "question"),))
# Around a user's control tokens while a dialogue is rendered. Unicode keeps both from any text that is exchanged.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_TIME = re.compile(r"""strftime_now\s*\(\s*(?:format\s*=\s*)?(["'])((?:(?!\1).)*)\1\s*\)""", re.S)
_MARKED, _TORN = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}"), re.compile(f"[{_OPEN}{_CLOSE}]")


class ChatTemplate:
    """The chat template of `tokenizer`.

    Args:
        date: YYYY-MM-DD, what the template gets for the present date, at midnight.

    Attributes:
        dated: whether it writes the date or the time; then `date` decides what prompts say.
        end_token: what ends an answer, if that is a token of its own.

    Raises:
        TemplateError: the tokenizer has no chat template, or one whose answers do not continue its own prompts.
    """

    name = CHAT

    def __init__(self, tokenizer, date: str = DATE):
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError(
                CHAT, f"the tokenizer has no chat template; choose one of {', '.join(sorted(TEXT_TEMPLATES))}"
            )
        self._tokenizer = tokenizer
        self._controls = re.compile("|".join(map(re.escape, sorted(control_tokens(tokenizer), key=len, reverse=True))))
        self.date, self._now = date, datetime.fromisoformat(date)
        self._last: tuple[Prompt | None, str] = (None, "")
        asked = self._render(_QUESTION, cue=True)
        if self._render(_QUESTION, cue=True) != asked:
            raise TemplateError(
                CHAT,
                "the tokenizer's chat template renders the same dialogue differently from "
                f"one time to the next; choose one of {', '.join(sorted(TEXT_TEMPLATES))}",
            )
        answered = self._render(_QUESTION, [Message("assistant", _PROBE)])
        at = answered.find(_PROBE.strip(), len(asked))
        if not answered.startswith(asked) and answered.startswith(re.sub(r"<think>\s*$", "", asked)):
            raise TemplateError(
                CHAT,
                "the tokenizer's chat template opens a reasoning block, <think>, where it "
                "asks for an answer, but renders answers without: take that out of its generation prompt, "
                f"or choose one of {', '.join(sorted(TEXT_TEMPLATES))}",
            )
        if not answered.startswith(asked) or at < 0:
            raise TemplateError(
                CHAT,
                "the tokenizer's chat template does not render an answer as the "
                f"continuation of its prompt; choose one of {', '.join(sorted(TEXT_TEMPLATES))}",
            )
        end = at + len(_PROBE.strip())
        if answered[at - 1 : end + 1] == _PROBE:  # else the template trims answers
            at, end = at - 1, end + 1
        self.lead, self._close = answered[len(asked) : at], answered[end:]
        found = self._controls.search(self._close)
        self.end_token = found[0] if found else None
        self.tail = self._close[: found.start()] if found else ""
        templates = tokenizer.chat_template
        self.dated = any(map(_TIME.search, templates.values() if isinstance(templates, dict) else [templates]))

    def prompt_text(self, prompt: Prompt) -> str:
        """The rendered prompt, up to and including the assistant's cue."""
        return _unmarked(self._asked(prompt))

    def response_text(self, answer: Answer, prompt: Prompt | None = None) -> str:
        """The rendered answer, up to its end token."""
        return "".join(piece.text for piece in self.response_pieces(answer, prompt))

    def prompt_pieces(self, prompt: Prompt) -> list[Piece]:
        return _pieces(self._asked(prompt))

    def response_pieces(self, answer: Answer, prompt: Prompt | None = None) -> list[Piece]:
        prompt = prompt or _QUESTION
        turns = turns_of(answer)
        asked, whole = self._asked(prompt), self._render(prompt, turns)
        if not whole.startswith(asked):
            raise TemplateError(
                CHAT,
                "the tokenizer's chat template does not render this answer as the "
                f"continuation of its prompt, of the roles {_roles(prompt.messages)}",
            )
        if not whole.endswith(self._close):
            raise TemplateError(
                CHAT,
                "the tokenizer's chat template ends this answer otherwise than a plain "
                f"one, with something else than {self._close!r}",
            )
        text = whole[len(asked) : len(whole) - len(self._close)] + self.tail
        self._check_answer(turns[-1], text)
        self._check_written([turn for turn in turns if turn.role != "assistant"], text)
        return _pieces(text)

    def _asked(self, prompt: Prompt) -> str:
        """The rendering of a prompt, with a user's control tokens marked. That of the last one is kept."""
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

    def _check_answer(self, answer: Message, text: str) -> None:
        # Some templates part an answer's reasoning from it, and write, move or drop that by rules of their own.
        for part in re.split("</?think>", self._mark(answer.content)):
            self._check(part.strip() in text, "a part of this answer, such as its reasoning")
        more = _more(answer)
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
            return self._tokenizer.apply_chat_template(
                [self._as_dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=cue,
                tools=tools,
                chat_template=at_time(self._tokenizer.get_chat_template(tools=tools), self._now),
            )
        except TemplateError:
            raise
        except Exception as error:  # a template is a program, and raises what it likes
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
        """`text` with its control tokens between marks, so that they can be told from those of the template."""
        return self._controls.sub(f"{_OPEN}\\g<0>{_CLOSE}", _unmarked(text)) if self._controls.pattern else text

    def _marked(self, value):
        """`_mark` on all texts in a JSON value."""
        if isinstance(value, str):
            return self._mark(value)
        if isinstance(value, list):
            return [self._marked(item) for item in value]
        if isinstance(value, dict):
            return {self._mark(key): self._marked(item) for key, item in value.items()}
        return value


@lru_cache
def at_time(chat_template: str, now: datetime) -> str:
    """The template with the time written in where it asks for the present one.

    Raises:
        TemplateError: it asks in a way that is not understood.
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


def control_tokens(tokenizer) -> set[str]:
    """The tokens that steer a model, which no user's text may turn into: the special ones, and those added ones of
    which the chat template makes its turns. Markup that answers contain, such as <think> and </think>, is not of these.
    """
    template, added = str(getattr(tokenizer, "chat_template", None) or ""), tokenizer.added_tokens_decoder
    contents = {token.content for token in added.values()}
    found = {
        token.content
        for token in added.values()
        if token.special
        or token.content.strip()
        and token.content in template
        and not _is_markup(token.content, contents)
    }
    return found | {token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token}


def _is_markup(token: str, tokens: set[str]) -> bool:
    name = re.fullmatch(r"</?([\w.-]+)>", token)
    return name is not None and {f"<{name[1]}>", f"</{name[1]}>"} <= tokens


def _roles(messages: Iterable[Message]) -> str:
    return ", ".join(message.role for message in messages)


def _pieces(marked: str) -> list[Piece]:
    """What is between marks is a user's. At a mark that the template has torn from its partner the text is parted, so
    that what stands around it does not join to a token."""
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
