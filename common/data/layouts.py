"""Column layouts understood without configuration, and what each gives.

- ``prompt, chosen, rejected``: a comparison; the prompt is a question, a transcript or a list of messages.
  If chosen and rejected are whole dialogues themselves, the next line applies. Optional: ``system_prompt``,
  and ``response``, the demonstration (else ``chosen`` is).
- ``chosen, rejected``: two dialogues, "\\n\\nHuman: ...\\n\\nAssistant: ..." or lists of messages, which
  share all but the last answer: what they share is the prompt.
- ``prompt, response``: a demonstration. Optional: ``system_prompt``.
- ``instruction, output``: a demonstration (Alpaca). Optional: ``input``, put after the instruction and an
  empty line.
- ``question, response``: a demonstration. Optional: ``system_prompt``.
- ``messages``, ``conversations``: a list of role/content or, as ShareGPT has it, of from/value (human, gpt,
  system): the last assistant message is the response; as a prompt alone, the answer may be missing.
- ``prompt``: a prompt. Optional: ``system_prompt``.
- ``text``: plain text. Blank texts, by which some sets part paragraphs, are left out.

A comparison also serves as a demonstration, and all but plain text as prompts.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.data.dialogues import (BadRow, clean_text, is_transcript, is_whole_dialogue, make_prompt, questions,
                                   read_answered, read_dialogue, read_prompt)
from common.data.records import (Comparison, Demonstration, Message, PlainText, Prompt, Record,
                                 user_turns)


@dataclass(frozen=True)
class Example:
    """All that one row says; '' for what is empty or missing. ``tied``: the two answers are as good as each
    other."""

    prompt: Prompt | None = None
    response: str = ""
    chosen: str = ""
    rejected: str = ""
    text: str = ""
    tied: bool = False


@dataclass(frozen=True)
class Layout:
    """``read`` turns a row's columns into an Example or raises BadRow. ``kinds``: the records it can give.
    ``asked``: the values of a row that hold the user's messages, see `dialogues.questions`."""

    required: tuple[str, ...]
    kinds: tuple[str, ...]
    read: Callable[[dict[str, Any]], Example]
    optional: tuple[str, ...] = ()
    asked: Callable[[dict[str, Any]], Sequence[Any]] = lambda row: ()

    def __str__(self) -> str:
        return "/".join(self.required)


COMPARISONS = ("comparison", "demonstration", "prompt")
DEMONSTRATIONS = ("demonstration", "prompt")


def asked(layout: Layout, row: dict[str, Any]) -> set[tuple[str, ...]]:
    """The user's messages in a row, whatever kind of record is wanted of it: as its prompt has them or, where it has
    none, as they can be read; more than one sequence where the columns then differ about them."""
    with contextlib.suppress(BadRow):
        return {user_turns(to_record(layout, row, "prompt"))}
    with contextlib.suppress(BadRow):
        return {found for value in layout.asked(row) if (found := questions(value))}
    return set()


def to_record(layout: Layout, row: dict[str, Any], kind: str) -> Record | None:
    """The row as a record of ``kind`` (one of ``layout.kinds``); None for a tie where a comparison is asked
    for, and for a blank text.

    Raises BadRow if a column is missing or empty, of the wrong type, or chosen == rejected.
    """
    for column in layout.required:
        if row.get(column) is None:
            raise BadRow(f"'{column}' is missing")
    example = layout.read(row)
    if kind == "text":
        return PlainText(example.text) if example.text else None
    if kind == "prompt":
        return example.prompt
    if kind == "demonstration":
        return Demonstration(example.prompt, _filled(example.response or example.chosen, "answer"))
    if example.tied:
        return None
    chosen, rejected = _filled(example.chosen, "chosen answer"), _filled(example.rejected, "rejected answer")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    return Comparison(example.prompt, chosen, rejected)


def _filled(text: str, name: str) -> str:
    if not text:
        raise BadRow(f"the {name} is empty")
    return text


def _comparison(row: dict[str, Any]) -> Example:
    if is_whole_dialogue(row["chosen"]) and is_whole_dialogue(row["rejected"]):
        return _dialogues(row)
    prompt = read_prompt(row["prompt"], "prompt", _system(row))
    response, chosen, rejected = (_answer(row, column) for column in ("response", "chosen", "rejected"))
    return Example(prompt, response=response, chosen=chosen, rejected=rejected)


def _system(row: dict[str, Any]) -> str:
    return clean_text(row.get("system_prompt"), "system_prompt")


def _answer(row: dict[str, Any], column: str) -> str:
    answer = clean_text(row.get(column), column)
    # Some sets leave the cue out of the prompt and begin the answer with it.
    return answer.removeprefix("Assistant:").lstrip() if is_transcript(row["prompt"]) else answer


def _dialogues(row: dict[str, Any]) -> Example:
    before, chosen = read_answered(row["chosen"], "chosen")
    before_rejected, rejected = read_answered(row["rejected"], "rejected")
    if before != before_rejected:
        raise BadRow("chosen and rejected differ before the last answer")
    if isinstance(row["chosen"], list) and all(message.role == "assistant" for message in before):
        # Lists that hold the answers alone; what comes before them is in the prompt.
        prompt = row.get("prompt")
        before = [*(read_dialogue(prompt, "prompt") if isinstance(prompt, list)
                    else [Message("user", clean_text(prompt, "prompt"))]), *before]
    return Example(make_prompt(before, "chosen", _system(row)), chosen=chosen, rejected=rejected)


def _instruction(row: dict[str, Any]) -> Example:
    prompt = make_prompt([Message("user", _instructed(row))], "instruction")
    return Example(prompt, response=clean_text(row["output"], "output"))


def _instructed(row: dict[str, Any]) -> str:
    parts = [clean_text(row.get(column), column) for column in ("instruction", "input")]
    return "\n\n".join(part for part in parts if part)


def _answered(question: str) -> Callable[[dict[str, Any]], Example]:
    def read(row: dict[str, Any]) -> Example:
        prompt = read_prompt(row[question], question, _system(row))
        return Example(prompt, response=clean_text(row["response"], "response"))
    return read


def _messages(column: str) -> Callable[[dict[str, Any]], Example]:
    def read(row: dict[str, Any]) -> Example:
        if not isinstance(row[column], list):
            raise BadRow(f"'{column}' is not a list")
        messages = read_dialogue(row[column], column)
        answers = [at for at, message in enumerate(messages) if message.role == "assistant" and message.content]
        if not answers:
            return Example(make_prompt(messages, column))
        return Example(make_prompt(messages[:answers[-1]], column), response=messages[answers[-1]].content)
    return read


def _prompt(row: dict[str, Any]) -> Example:
    return Example(read_prompt(row["prompt"], "prompt", _system(row)))


def _text(row: dict[str, Any]) -> Example:
    return Example(text=clean_text(row["text"], "text"))


def _in(*columns: str) -> Callable[[dict[str, Any]], list[Any]]:
    return lambda row: [row.get(column) for column in columns]


def _in_pair(row: dict[str, Any]) -> list[Any]:
    dialogues = [row.get(column) for column in ("chosen", "rejected")]
    return [row.get("prompt"), *(value for value in dialogues if isinstance(value, list) or is_transcript(value))]


def as_question(text: Any) -> list[dict[str, Any]]:
    """A user's message whose text is no transcript, whatever it looks like."""
    return [{"role": "user", "content": text}]


PROMPT_PAIR = Layout(("prompt", "chosen", "rejected"), COMPARISONS, _comparison,
                     ("response", "system_prompt"), _in_pair)
DIALOGUE_PAIR = Layout(("chosen", "rejected"), COMPARISONS, _dialogues, ("system_prompt",), _in_pair)
PROMPT_RESPONSE = Layout(("prompt", "response"), DEMONSTRATIONS, _answered("prompt"), ("system_prompt",),
                         _in("prompt"))
INSTRUCTION = Layout(("instruction", "output"), DEMONSTRATIONS, _instruction, ("input",),
                     lambda row: [as_question(_instructed(row))])
QUESTION_RESPONSE = Layout(("question", "response"), DEMONSTRATIONS, _answered("question"),
                           ("system_prompt",), _in("question"))
MESSAGES = Layout(("messages",), DEMONSTRATIONS, _messages("messages"), asked=_in("messages"))
CONVERSATIONS = Layout(("conversations",), DEMONSTRATIONS, _messages("conversations"), asked=_in("conversations"))
PROMPT = Layout(("prompt",), ("prompt",), _prompt, ("system_prompt",), _in("prompt"))
TEXT = Layout(("text",), ("text",), _text)

# In the order in which they are tried: the first that fits the columns and gives the kind asked for.
LAYOUTS = (PROMPT_PAIR, DIALOGUE_PAIR, PROMPT_RESPONSE, INSTRUCTION, QUESTION_RESPONSE, MESSAGES,
           CONVERSATIONS, PROMPT, TEXT)
