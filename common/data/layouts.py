"""Column layouts understood without configuration, and what each gives.

A layout names the columns it needs; the table is `LAYOUTS`, at the end. What the names mean:

- ``prompt``, ``question``, ``instruction``, ``input``: what is asked: a plain question, a transcript
  ("\\n\\nHuman: ...\\n\\nAssistant:"), or a list of messages (role/content, or from/value as ShareGPT has it).
- ``response``, ``completion``, ``output``, ``answer``: its answer: a text, a message, or messages the last of which
  answers. A list of texts is a ranking, the best first: comparisons of each with all behind it.
- ``chosen``, ``rejected``: the better and the worse answer; lists of texts are several of them: comparisons of each
  chosen with each rejected one. Both may be whole dialogues: what they share is the prompt, and they are compared
  from their first difference on.
- ``messages``, ``conversations``: a whole dialogue: its last assistant message is the response, and what comes before
  it the prompt. As a prompt alone, a dialogue that ends with a question asks that.
- ``text``: plain text. Blank texts, by which some sets part paragraphs, are left out.

Optional columns, wherever they have a sense: ``system_prompt`` or ``system``; ``context``, ``input``, ``document``,
``passage``, put behind the question and an empty line; ``history``, pairs of earlier questions and answers;
``tools``, for chat templates; ``label``, whether an answer is a good one (bad ones demonstrate nothing); the scores of
a pair or their ``margin``, equal ones being ties, which are left out.

A comparison also serves as a demonstration, and all but plain text as prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from common.data.dialogues import (
    answer_of,
    as_json,
    is_transcript,
    is_whole_dialogue,
    joined,
    make_prompt,
    read_dialogue,
    read_question,
)
from common.data.examples import Example, Layout
from common.data.records import Answer, Message, Prompt, Role
from common.data.values import BadRow, are_several, as_text, clean_answer, clean_text, is_texts

COMPARISONS = ("comparison", "demonstration", "prompt")
DEMONSTRATIONS = ("demonstration", "prompt")
COMPANIONS = ("context", "input", "document", "passage")
_SYSTEM = ("system_prompt", "system")
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
_LABELS = ("label", "kto_tag")  # whether an answer is a good one
_RANKS = ("scores", "ranks")  # of the answers in a list: higher scores are better, lower ranks
_BESIDE = (*_SYSTEM, *COMPANIONS, "history", "tools")
_BESIDE_PAIR = (*_BESIDE, "margin", *(name for pair in _SCORES for name in pair))


# ---- what stands beside a question


def _system(row: dict[str, Any]) -> str:
    return "\n\n".join(dict.fromkeys(filter(None, (clean_text(row.get(column), column) for column in _SYSTEM))))


def _companions(row: dict[str, Any], beside: Sequence[str] = COMPANIONS) -> list[str]:
    return list(dict.fromkeys(text for column in beside if (text := clean_text(row.get(column), column))))


def _history(row: dict[str, Any]) -> list[Message]:
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadRow("'history' is not a list of pairs, question and answer")
    roles: tuple[Role, Role] = "user", "assistant"
    return [Message(role, clean_text(text, "history")) for pair in pairs for role, text in zip(roles, pair)]


def _tools(row: dict[str, Any]) -> str:
    tools = row.get("tools") or ""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRow("'tools' is no JSON") from None
    if not tools or not isinstance(tools, list):
        if tools and not isinstance(tools, str):
            raise BadRow("'tools' is not a list")
        return ""
    return as_json(tools, "tools")


def _asked(row: dict[str, Any], column: str, beside: Sequence[str] = COMPANIONS) -> Prompt:
    """What the row asks in ``column``, with all that belongs to it."""
    return _with_all(row, read_question(row[column], column), column, beside)


def _with_all(
    row: dict[str, Any], messages: Sequence[Message], column: str, beside: Sequence[str] = COMPANIONS
) -> Prompt:
    messages = [*_history(row), *messages]
    added = _companions(row, beside)
    if added:
        last = max((at for at, message in enumerate(messages) if message.role == "user"), default=None)
        if last is None:
            raise BadRow(f"'{column}': no user's turn before the answer")
        asked = messages[last].content
        # Some sets have it in the question too: as lines of its own, as a short text may be in any.
        added = [text for text in added if f"\n{text}\n" not in f"\n{asked}\n"]
        messages[last] = replace(messages[last], content="\n\n".join(filter(None, (asked, *added))))
    system = _system(row)
    if messages and messages[0] == Message("system", system):
        system = ""
    return make_prompt(messages, column, system, _tools(row))


def _asked_in(column: str, beside: Sequence[str] = COMPANIONS) -> Callable[[dict[str, Any]], list[Any]]:
    """What `Layout.asked` gives for a question in the column."""
    return lambda row: [_with_beside(row, row.get(column), beside)]


def _with_beside(row: dict[str, Any], value: Any, beside: Sequence[str] = COMPANIONS) -> Any:
    """A value with the user's messages, and what stands beside it that belongs to these."""
    if value is None or not (row.get("history") or any(row.get(column) for column in beside)):
        return value
    prompt = _with_all(row, read_question(value, "prompt"), "prompt", beside)
    return [message for turn in prompt.asked for message in as_question(turn)]


# ---- what answers it


def _answer(value: Any, column: str, prompt: Prompt, asked: Any = None) -> Answer:
    """One answer: a text, messages of which the last is the assistant's, or the whole dialogue that such ones end."""
    if is_whole_dialogue(value) and not is_texts(value):
        messages = _without_system(joined(read_dialogue(value, column)))
        while messages and messages[-1].role != "assistant":
            messages.pop()
        before = _without_system(prompt.messages)
        if messages[: len(before)] == before:
            messages = messages[len(before) :]
        elif messages and messages[0].role != "assistant":
            raise BadRow(f"'{column}' holds another dialogue than the prompt's")
        return answer_of(messages) if messages else ""
    text = clean_answer(value, column)
    # Some sets leave the cue out of the prompt and begin the answer with it.
    return clean_answer(text.removeprefix("Assistant:"), column) if is_transcript(asked) else text


def _answers(value: Any, column: str, prompt: Prompt, asked: Any = None) -> tuple[Answer, ...]:
    """One or several: a list of texts, or of lists of messages, is several answers."""
    return tuple(_answer(item, column, prompt, asked) for item in (value if are_several(value) else [value]))


def _without_system(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message.role != "system"]


def _answered(question: str, answer: str, beside: Sequence[str] = COMPANIONS) -> Callable[[dict[str, Any]], Example]:
    def read(row: dict[str, Any]) -> Example:
        prompt = _asked(row, question, beside)
        answers = _answers(row[answer], answer, prompt, row[question])
        if len(answers) == 1:
            return Example(prompt, answers[0], label=_label(row))
        goodness = _goodness(row, len(answers))
        order = sorted(range(len(answers)), key=lambda at: -goodness[at])
        pairs = tuple(
            (answers[better], answers[worse])
            for at, better in enumerate(order)
            for worse in order[at + 1 :]
            if goodness[better] > goodness[worse]
        )
        return Example(prompt, answers[order[0]], pairs, tied=not pairs)

    return read


def _goodness(row: dict[str, Any], count: int) -> list[float]:
    """A number for each of the answers of a list, higher for a better one: without scores or ranks, by their order."""
    for column, sign in zip(_RANKS, (1, -1)):
        if row.get(column) is not None:
            try:
                found = [sign * float(value) for value in row[column]]
            except (TypeError, ValueError):
                raise BadRow(f"'{column}' is no list of numbers") from None
            if len(found) != count:
                raise BadRow(f"'{column}' has {len(found)} numbers for {count} answers")
            return found
    return [-float(at) for at in range(count)]


def _label(row: dict[str, Any]) -> bool:
    """What the row says of its answer: whether it is a good one; it is where nothing is said."""
    label = row.get("kto_tag") if row.get("label") is None else row["label"]
    known = {"true": True, "1": True, "1.0": True, "": True, "false": False, "0": False, "0.0": False, "-1": False}
    text = as_text(label, "label").strip().lower()
    if text not in known:
        raise BadRow(f"'label' is {text[:20]!r}, neither true nor false")
    return known[text]


def _tied(row: dict[str, Any]) -> bool:
    """Whether the row says that its answers are as good as each other."""
    scores = [
        (row[one], row[other]) for one, other in _SCORES if row.get(one) is not None and row.get(other) is not None
    ]
    if row.get("margin") is not None:
        scores.append((row["margin"], 0))
    try:
        return any(float(one) == float(other) for one, other in scores)
    except (TypeError, ValueError):
        raise BadRow("a score or margin is no number") from None


def _compared(question: str) -> Callable[[dict[str, Any]], Example]:
    """A pair whose prompt is in a column of its own, unless both are whole dialogues."""

    def read(row: dict[str, Any]) -> Example:
        if all(is_whole_dialogue(row[column]) and not are_several(row[column]) for column in ("chosen", "rejected")):
            return _dialogues(row, question)
        prompt, asked = _asked(row, question), row[question]
        good, bad = (_answers(row[column], column, prompt, asked) for column in ("chosen", "rejected"))
        pairs = tuple((better, worse) for better in good for worse in bad)
        shown = _answer(row.get("response"), "response", prompt, asked)
        return Example(prompt, shown or good[0], pairs, tied=_tied(row))

    return read


def _dialogues(row: dict[str, Any], question: str = "prompt") -> Example:
    chosen, rejected = (_with_answer(row[column], column) for column in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen[shared].role != "assistant" or rejected[shared].role != "assistant":
        raise BadRow("chosen and rejected differ before the last answer, in what is asked")
    before = chosen[:shared]
    if row.get(question) is not None:
        before = _both(read_question(row[question], question), before)
    prompt = _with_all(row, before, "chosen")
    pair = _turns(chosen[shared:], "chosen"), _turns(rejected[shared:], "rejected")
    return Example(prompt, pair[0], (pair,), tied=_tied(row))


def _both(asked: list[Message], before: list[Message]) -> list[Message]:
    """What comes before an answer, of which the prompt and the dialogue may each have a part."""
    rest, shared = _without_system(before), _without_system(asked)
    if not any(message.role == "user" for message in before):  # the dialogue holds the answers alone
        return [*asked, *before]
    if shared[len(shared) - len(rest) :] == rest:  # it begins with the last turns of the prompt
        return asked if len(asked) > len(shared) else [*before[: len(before) - len(rest)], *asked]
    if rest[: len(shared)] == shared and len(before) == len(rest):
        return [*(message for message in asked if message.role == "system"), *before]
    return before


def _turns(messages: Sequence[Message], column: str) -> Answer:
    """The messages from the first one in which two dialogues differ, as an answer; '' if the last one is empty."""
    turns = joined(messages)
    if not messages[-1].content and not messages[-1].more:
        return ""
    if turns[0].role != "assistant":
        raise BadRow(f"'{column}' has an empty answer before its last one")
    return answer_of(turns)


def _with_answer(value: Any, column: str) -> list[Message]:
    """The messages of a dialogue that ends with an answer, which may be ''. Raises BadRow if it does not."""
    messages = read_dialogue(value, column)
    if not messages or messages[-1].role != "assistant":
        raise BadRow(f"'{column}' does not end with an answer of the assistant")
    return messages


def _messages(column: str) -> Callable[[dict[str, Any]], Example]:
    def read(row: dict[str, Any]) -> Example:
        if not isinstance(row[column], list):
            raise BadRow(f"'{column}' is not a list")
        messages = read_dialogue(row[column], column)
        answers = [
            at
            for at, message in enumerate(messages)
            if message.role == "assistant" and (message.content or message.more)
        ]
        if not answers:
            return Example(_with_all(row, messages, column, ()))
        last = answers[-1]
        goes_on = any(message.content for message in messages[last + 1 :])
        asked = messages if goes_on else messages[:last]
        while asked and asked[-1].role == "assistant":
            asked = asked[:-1]
        asks = _with_all(row, asked, column, ())
        last = max((at for at in answers if messages[at].trained), default=last)
        first = last
        while first and messages[first - 1].role == "assistant" and len(joined(messages[first - 1 : last + 1])) == 1:
            first -= 1
        (answer,) = joined(messages[first : last + 1])
        prompt = _with_all(row, messages[:first], column, ())
        return Example(prompt, answer_of([answer]) if answer.trained else (answer,), asks=asks, label=_label(row))

    return read


def _prompt(row: dict[str, Any]) -> Example:
    return Example(_asked(row, "prompt"))


def _text(row: dict[str, Any]) -> Example:
    return Example(text=clean_text(row["text"], "text"))


def _in_pair(question: str) -> Callable[[dict[str, Any]], list[Any]]:
    def asked(row: dict[str, Any]) -> list[Any]:
        dialogues = [row.get(column) for column in ("chosen", "rejected")]
        values = [
            row.get(question),
            *(value for value in dialogues if isinstance(value, list) and not is_texts(value) or is_transcript(value)),
        ]
        return [_with_beside(row, value) for value in values if value is not None]

    return asked


def as_question(text: Any) -> list[dict[str, Any]]:
    """A user's message whose text is no transcript, whatever it looks like."""
    return [{"role": "user", "content": text}]


def _pair_of(question: str) -> Layout:
    return Layout(
        (question, "chosen", "rejected"),
        COMPARISONS,
        _compared(question),
        tuple(column for column in ("response", *_BESIDE_PAIR) if column != question),
        _in_pair(question),
    )


def _answer_to(question: str, answer: str) -> Layout:
    beside = tuple(column for column in COMPANIONS if column != question)
    return Layout(
        (question, answer),
        DEMONSTRATIONS,
        _answered(question, answer, beside),
        (*_SYSTEM, *beside, "history", "tools", *_LABELS, *_RANKS),
        _asked_in(question, beside),
        ranked=answer,
    )


_QUESTIONS = ("prompt", "instruction", "question", "query", "input")
_ANSWERS = ("response", "completion", "output", "answer", "responses", "completions", "answers")
_PAIRS = tuple(_pair_of(question) for question in (*_QUESTIONS, "conversations", "messages"))
_ANSWERED = {
    (question, answer): _answer_to(question, answer)
    for question, answer in (
        # Where there is an instruction, a prompt beside it is the whole of the row in a template, its answer included.
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
    Layout((column,), DEMONSTRATIONS, _messages(column), (*_SYSTEM, "tools", *_LABELS), _asked_in(column, ()))
    for column in ("messages", "conversations")
)
PROMPT = Layout(("prompt",), ("prompt",), _prompt, _BESIDE, _asked_in("prompt"))
TEXT = Layout(("text",), ("text",), _text)

# In the order in which they are tried: the first that fits the columns and gives the kind asked for.
LAYOUTS = (*_PAIRS, DIALOGUE_PAIR, *_ANSWERED.values(), *_MESSAGES, PROMPT, TEXT)


def described(kind: str | None = None) -> str:
    """The layouts that give records of ``kind``, or all, for a message."""
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
