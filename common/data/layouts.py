"""Defines the column layouts that are understood without configuration, and the records that each gives.

A layout names the columns it needs; the table is `LAYOUTS`, at the end. What the names mean:

- `prompt`, `question`, `instruction`, `input`: what is asked: a plain question, a transcript
  ("\\n\\nHuman: ...\\n\\nAssistant:"), or a list of messages (role/content, or from/value as ShareGPT has it).
- `response`, `completion`, `output`, `answer`: the response: a text, a message, or messages of which the last
  is the assistant's. A list of texts is a ranking, the best first: comparisons of each with all behind it.
- `chosen`, `rejected`: the better and the worse response; lists of texts are several of them: comparisons of each
  chosen with each rejected one. Both may be whole dialogues: what they share is the prompt, and they are compared
  from their first difference on.
- `messages`, `conversations`: a whole dialogue: its last assistant message is the response, and what comes before
  it the prompt. Where prompts alone are wanted, a dialogue that ends with a question asks that question.
- `text`: plain text. Blank texts, by which some sets separate paragraphs, are left out.

Optional columns, wherever they make sense: `system_prompt` or `system`; `context`, `input`, `document`,
`passage`, put behind the question and an empty line; `history`, pairs of earlier questions and responses;
`tools`, for chat templates; `label`, whether a response is a good one (bad ones demonstrate nothing); the scores of
a pair or their `margin`: equal scores are ties, which are left out.

A comparison also serves as a demonstration, and all but plain text as prompts. Feedback comes of a `label`, or of a
comparison: one desirable response and one undesirable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from common.data.dialogues import is_transcript, is_whole_dialogue, joined, read_dialogue, read_question, response_of
from common.data.examples import Example, Layout
from common.data.prompt_columns import (
    BESIDE,
    COMPANIONS,
    SYSTEM,
    prompt_in,
    prompt_of,
    user_values_in,
    with_companions,
)
from common.data.records import Message, Response
from common.data.response_columns import (
    LABELS,
    RANKS,
    SCORES,
    goodness,
    is_tied,
    label_of,
    response_in,
    responses_in,
    without_system,
)
from common.data.values import BadRow, are_several, clean_text, is_texts

COMPARISONS = ("comparison", "demonstration", "prompt")
DEMONSTRATIONS = ("demonstration", "prompt")
_BESIDE_PAIR = (*BESIDE, "margin", *(name for pair in SCORES for name in pair))


def _responded(
    question: str, response: str, companions: Sequence[str] = COMPANIONS
) -> Callable[[dict[str, Any]], Example]:
    def read(row: dict[str, Any]) -> Example:
        prompt = prompt_in(row, question, companions)
        responses = responses_in(row[response], response, prompt, row[question])
        if len(responses) == 1:
            return Example(prompt, responses[0], label=label_of(row))
        values = goodness(row, len(responses))
        order = sorted(range(len(responses)), key=lambda at: -values[at])
        pairs = tuple(
            (responses[better], responses[worse])
            for at, better in enumerate(order)
            for worse in order[at + 1 :]
            if values[better] > values[worse]
        )
        return Example(prompt, responses[order[0]], pairs, tied=not pairs)

    return read


def _compared(question: str) -> Callable[[dict[str, Any]], Example]:
    """A pair whose prompt is in a column of its own, unless both are whole dialogues."""

    def read(row: dict[str, Any]) -> Example:
        if all(is_whole_dialogue(row[column]) and not are_several(row[column]) for column in ("chosen", "rejected")):
            return _dialogues(row, question)
        prompt, value = prompt_in(row, question), row[question]
        good, bad = (responses_in(row[column], column, prompt, value) for column in ("chosen", "rejected"))
        pairs = tuple((better, worse) for better in good for worse in bad)
        demonstrated = response_in(row.get("response"), "response", prompt, value)
        return Example(prompt, demonstrated or good[0], pairs, tied=is_tied(row))

    return read


def _dialogues(row: dict[str, Any], question: str = "prompt") -> Example:
    chosen, rejected = (_with_response(row[column], column) for column in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen[shared].role != "assistant" or rejected[shared].role != "assistant":
        raise BadRow("chosen and rejected differ before the last answer, in what is asked")
    before = chosen[:shared]
    if row.get(question) is not None:
        before = _combined(read_question(row[question], question), before)
    prompt = prompt_of(row, before, "chosen")
    pair = _turns(chosen[shared:], "chosen"), _turns(rejected[shared:], "rejected")
    return Example(prompt, pair[0], (pair,), tied=is_tied(row))


def _combined(prompt: list[Message], dialogue: list[Message]) -> list[Message]:
    """What comes before a response, of which the prompt's column and the dialogue's column may each hold a part.

    Args:
        prompt: the messages of the prompt's column.
        dialogue: the messages before the response in the dialogue's column.
    """
    dialogue_turns, prompt_turns = without_system(dialogue), without_system(prompt)
    if not any(message.role == "user" for message in dialogue):  # the dialogue's column holds responses alone
        return [*prompt, *dialogue]
    if prompt_turns[len(prompt_turns) - len(dialogue_turns) :] == dialogue_turns:  # the last turns of the prompt
        if len(prompt) > len(prompt_turns):
            return prompt
        return [*dialogue[: len(dialogue) - len(dialogue_turns)], *prompt]
    if dialogue_turns[: len(prompt_turns)] == prompt_turns and len(dialogue) == len(dialogue_turns):
        return [*(message for message in prompt if message.role == "system"), *dialogue]
    return dialogue


def _turns(messages: Sequence[Message], column: str) -> Response:
    """The messages from the first in which two dialogues differ, as a response; '' if the last of them is empty."""
    turns = joined(messages)
    if not messages[-1].content and not messages[-1].more:
        return ""
    if turns[0].role != "assistant":
        raise BadRow(f"'{column}' has an empty answer before its last one")
    return response_of(turns)


def _with_response(value: Any, column: str) -> list[Message]:
    """The messages of a dialogue that ends with a response, which may be empty. Raises BadRow if it does not."""
    messages = read_dialogue(value, column)
    if not messages or messages[-1].role != "assistant":
        raise BadRow(f"'{column}' does not end with an answer of the assistant")
    return messages


def _messages(column: str) -> Callable[[dict[str, Any]], Example]:
    def read(row: dict[str, Any]) -> Example:
        if not isinstance(row[column], list):
            raise BadRow(f"'{column}' is not a list")
        messages = read_dialogue(row[column], column)
        responses = [
            at
            for at, message in enumerate(messages)
            if message.role == "assistant" and (message.content or message.more)
        ]
        if not responses:
            return Example(prompt_of(row, messages, column, ()))
        last = responses[-1]
        goes_on = any(message.content for message in messages[last + 1 :])
        questions = messages if goes_on else messages[:last]
        while questions and questions[-1].role == "assistant":
            questions = questions[:-1]
        open_prompt = prompt_of(row, questions, column, ())
        last = max((at for at in responses if messages[at].trained), default=last)
        first = last
        while first and messages[first - 1].role == "assistant" and len(joined(messages[first - 1 : last + 1])) == 1:
            first -= 1
        (response,) = joined(messages[first : last + 1])
        prompt = prompt_of(row, messages[:first], column, ())
        # An untrained response stays a message, so that its mark is kept.
        trained = response_of([response]) if response.trained else (response,)
        return Example(prompt, trained, open_prompt=open_prompt, label=label_of(row))

    return read


def _prompt(row: dict[str, Any]) -> Example:
    return Example(prompt_in(row, "prompt"))


def _text(row: dict[str, Any]) -> Example:
    return Example(text=clean_text(row["text"], "text"))


def _in_pair(question: str) -> Callable[[dict[str, Any]], list[Any]]:
    def user_values(row: dict[str, Any]) -> list[Any]:
        dialogues = [row.get(column) for column in ("chosen", "rejected")]
        values = [
            row.get(question),
            *(value for value in dialogues if isinstance(value, list) and not is_texts(value) or is_transcript(value)),
        ]
        return [with_companions(row, value) for value in values if value is not None]

    return user_values


def _pair_of(question: str) -> Layout:
    return Layout(
        (question, "chosen", "rejected"),
        COMPARISONS,
        _compared(question),
        tuple(column for column in ("response", *_BESIDE_PAIR) if column != question),
        _in_pair(question),
    )


def _response_to(question: str, response: str) -> Layout:
    companions = tuple(column for column in COMPANIONS if column != question)
    return Layout(
        (question, response),
        DEMONSTRATIONS,
        _responded(question, response, companions),
        (*SYSTEM, *companions, "history", "tools", *LABELS, *RANKS),
        user_values_in(question, companions),
        ranked=response,
    )


_QUESTIONS = ("prompt", "instruction", "question", "query", "input")
_ANSWERS = ("response", "completion", "output", "answer", "responses", "completions", "answers")
_PAIRS = tuple(_pair_of(question) for question in (*_QUESTIONS, "conversations", "messages"))
_ANSWERED = {
    (question, answer): _response_to(question, answer)
    for question, answer in (
        # First, since a prompt beside an instruction is the whole row in a template, its response included.
        ("instruction", "output"),
        *((question, answer) for question in _QUESTIONS for answer in _ANSWERS),
    )
}
PROMPT_PAIR = _PAIRS[0]
DIALOGUE_PAIR = Layout(("chosen", "rejected"), COMPARISONS, _dialogues, _BESIDE_PAIR, _in_pair("prompt"))
PROMPT_RESPONSE = _ANSWERED["prompt", "response"]
INSTRUCTION = _ANSWERED["instruction", "output"]
QUESTION_RESPONSE = _ANSWERED["question", "response"]
_MESSAGES = tuple(
    Layout((column,), DEMONSTRATIONS, _messages(column), (*SYSTEM, "tools", *LABELS), user_values_in(column, ()))
    for column in ("messages", "conversations")
)
PROMPT = Layout(("prompt",), ("prompt",), _prompt, BESIDE, user_values_in("prompt"))
TEXT = Layout(("text",), ("text",), _text)

# In the order in which they are tried: the first one is taken that fits the columns and gives the wanted kind.
LAYOUTS = (*_PAIRS, DIALOGUE_PAIR, *_ANSWERED.values(), *_MESSAGES, PROMPT, TEXT)


def described(kind: str | None = None) -> str:
    """The layouts that give records of `kind`, or all, for a message."""
    if kind == "feedback":
        return f"{described('comparison')}, or label beside prompt/response, messages and the like"
    groups = (
        ((PROMPT_PAIR, DIALOGUE_PAIR), "prompt/chosen/rejected, chosen/rejected"),
        (
            (PROMPT_RESPONSE,),
            f"prompt/response, instruction/output and the like ({' or '.join(_QUESTIONS)} with "
            f"{' or '.join(_ANSWERS)})",
        ),
        (_MESSAGES, "messages, conversations"),
        ((PROMPT,), "prompt"),
        ((TEXT,), "text"),
    )
    return ", ".join(text for (layout, *_), text in groups if kind is None or kind in layout.kinds)
