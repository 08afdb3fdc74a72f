"""Maps a source's columns to a layout: data sets known by name, the column map, and the choice of a layout.

The sets known by name, and their columns:

- Dahoas/rm-static, Dahoas/full-hh-rlhf: prompt ("\\n\\nHuman: ...\\n\\nAssistant:", several turns), response
  (the chosen answer), chosen, rejected (" ..."); splits train and test.
- Dahoas/synthetic-instruct-gptj-pairwise: prompt (a question), chosen, rejected; train.
- yitingxie/rlhf-reward-datasets: prompt ("Human: ..."), chosen, rejected ("Assistant: ..."); train and test.
- Anthropic/hh-rlhf: chosen, rejected (whole transcripts); train and test. Its red-team files have other
  columns; they belong to no split and are left out.
- Open-Orca/OpenOrca: id, system_prompt (often empty), question, response; train.
- tatsu-lab/alpaca, yahma/alpaca-cleaned: instruction, input (often empty), output; the first also has text,
  which holds all of them in a template; train.
- shahules786/orca-chat: instruction (the system prompt), conversation: [{input, output}, ...]; one JSON
  array.
- stanfordnlp/SHP: history (the post), human_ref_A, human_ref_B, labels (1: A is preferred, 0: B), scores and
  more; train, validation and test.
- openai/webgpt_comparisons: question: {dataset, id, full_text}, answer_0, answer_1, score_0, score_1 (their
  sum is 0; both 0 is a tie), quotes and tokens; train.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from common.data.dialogues import make_prompt
from common.data.errors import ColumnsError, UnknownLayoutError
from common.data.examples import Example, Layout
from common.data.layouts import (
    COMPARISONS,
    DEMONSTRATIONS,
    DIALOGUE_PAIR,
    INSTRUCTION,
    LAYOUTS,
    PROMPT_PAIR,
    QUESTION_RESPONSE,
    described,
)
from common.data.prompt_columns import as_question
from common.data.records import Message
from common.data.values import BadRow, clean_response, clean_text
from common.errors import DataError, did_you_mean

_CITATION = re.compile(r"\s*\[\d+(?:,\s*\d+)*\]")


def _orca_chat(row: dict[str, Any]) -> Example:
    turns = row["conversation"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("'conversation' is not a list of input and output")
    messages = [
        message
        for turn in turns
        for message in (
            Message("user", clean_text(turn.get("input"), "input")),
            Message("assistant", clean_response(turn.get("output"), "output")),
        )
    ]
    system = clean_text(row["instruction"], "instruction")
    return Example(make_prompt(messages[:-1], "conversation", system), messages[-1].content)


def _shp(row: dict[str, Any]) -> Example:
    label = str(row["labels"])
    if label not in ("0", "1"):
        raise BadRow(f"'labels' is {label}, neither 0 nor 1")
    a, b = (clean_response(row[column], column) for column in ("human_ref_A", "human_ref_B"))
    chosen, rejected = (a, b) if label == "1" else (b, a)
    prompt = make_prompt([Message("user", clean_text(row["history"], "history"))], "history")
    return Example(prompt, chosen, ((chosen, rejected),))


def _webgpt(row: dict[str, Any]) -> Example:
    if not isinstance(row["question"], dict):
        raise BadRow("'question' has no 'full_text'")
    question = clean_text(row["question"].get("full_text"), "full_text")
    prompt = make_prompt([Message("user", question)], "full_text")
    try:
        first, second = float(row["score_0"]), float(row["score_1"])
    except (TypeError, ValueError):
        raise BadRow("'score_0' or 'score_1' is no number") from None
    # Citations refer to quotes that the model never sees.
    responses = [_CITATION.sub("", clean_response(row[column], column)) for column in ("answer_0", "answer_1")]
    chosen, rejected = responses if first >= second else responses[::-1]
    return Example(prompt, chosen, ((chosen, rejected),), tied=first == second)


def _orca_user_values(row: dict[str, Any]) -> list[Any]:
    turns = row.get("conversation")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [[message for turn in turns for message in as_question(turn.get("input"))]]


def _webgpt_user_values(row: dict[str, Any]) -> list[Any]:
    question = row.get("question")
    return [as_question(question.get("full_text"))] if isinstance(question, dict) else []


ORCA_CHAT = Layout(("instruction", "conversation"), DEMONSTRATIONS, _orca_chat, user_values=_orca_user_values)
SHP = Layout(
    ("history", "human_ref_A", "human_ref_B", "labels"),
    COMPARISONS,
    _shp,
    user_values=lambda row: [as_question(row.get("history"))],
)
WEBGPT = Layout(
    ("question", "answer_0", "answer_1", "score_0", "score_1"), COMPARISONS, _webgpt, user_values=_webgpt_user_values
)

_OTHERS = (ORCA_CHAT, SHP, WEBGPT)
NAMED = {
    "dahoas/rm-static": PROMPT_PAIR,
    "dahoas/full-hh-rlhf": PROMPT_PAIR,
    "dahoas/synthetic-instruct-gptj-pairwise": PROMPT_PAIR,
    "yitingxie/rlhf-reward-datasets": PROMPT_PAIR,
    "anthropic/hh-rlhf": DIALOGUE_PAIR,
    "open-orca/openorca": QUESTION_RESPONSE,
    "tatsu-lab/alpaca": INSTRUCTION,
    "yahma/alpaca-cleaned": INSTRUCTION,
    "shahules786/orca-chat": ORCA_CHAT,
    "stanfordnlp/shp": SHP,
    "openai/webgpt_comparisons": WEBGPT,
}
_PLURALS = {
    "prompt": "prompts",
    "demonstration": "demonstrations",
    "comparison": "comparisons",
    "feedback": "labelled answers",
    "text": "plain texts",
}


def named_layout(name: str) -> Layout | None:
    """The layout of a set known by name: on the hub, or where a path contains `owner/name` or ends with
    `name`."""
    parts = [part.lower() for part in PurePath(name).parts]
    path = f"/{'/'.join(parts)}/"
    for known, layout in NAMED.items():
        if f"/{known}/" in path or parts[-1:] == [known.split("/")[1]]:
            return layout
    return None


def _known_columns() -> list[str]:
    """The columns of all layouts, those of sets known by name included."""
    return list(
        dict.fromkeys(column for layout in (*LAYOUTS, *_OTHERS) for column in layout.required + layout.optional)
    )


class ColumnMap:
    """The user's own names for the columns that are understood, as in `{'prompt': 'question', 'chosen': 'good',
    'rejected': 'bad'}`.

    One map serves all files of a blend: it is applied to those that have all its columns. Raises ColumnsError
    for a key that is no column of any layout.
    """

    def __init__(self, names: Mapping[str, str] | None):
        self.names = dict(names or {})
        known = _known_columns()
        for key in self.names:
            if key not in known:
                raise ColumnsError(
                    f"'{key}'", f"no column that is understood{did_you_mean(key, known)}; those are {', '.join(known)}"
                )

    def for_kind(self, kind: str) -> ColumnMap:
        """The part of the map that concerns records of `kind`: text and dialogues may lie in different sources."""
        known = {column for layout in LAYOUTS if layout.can_give(kind) for column in layout.required + layout.optional}
        return ColumnMap({key: column for key, column in self.names.items() if key in known})

    def check(self, files: Mapping[str, Collection[str]]) -> None:
        """Raises ColumnsError if none of the `files` (label -> columns found) has all mapped columns."""
        if not files or any(self._fits(columns) for columns in files.values()):
            return
        label, columns = max(files.items(), key=lambda file: self._likeness(file[1]))
        key, column = next(item for item in self.names.items() if item[1] not in columns)
        raise ColumnsError(
            f"{key}={column}",
            f"{label} has no column '{column}' (for '{key}'){did_you_mean(column, columns)}; it has "
            f"{', '.join(sorted(columns))}",
        )

    def within(self, columns: Collection[str]) -> ColumnMap:
        """The map for a file with these columns: this one if the file has all its columns, else an empty one.

        Added to it are columns whose names differ from the understood ones only in case or in surrounding spaces, such
        as `Prompt`.
        """
        names = dict(self.names) if self._fits(columns) else {}
        taken = {*names, *names.values(), *columns}
        similar: dict[str, list[str]] = {}
        for column in set(columns) - set(names.values()):
            similar.setdefault(column.strip().lower(), []).append(column)
        names.update(
            {
                known: similar[known.lower()][0]
                for known in _known_columns()
                if known not in taken and len(similar.get(known.lower(), ())) == 1
            }
        )
        mapped = ColumnMap(None)
        mapped.names = names
        return mapped

    def _fits(self, columns: Collection[str]) -> bool:
        return set(self.names.values()) <= set(columns)

    def _likeness(self, columns: Collection[str]) -> tuple[int, int]:
        wanted = self.names.values()
        return sum(column in columns for column in wanted), sum(
            bool(did_you_mean(column, columns)) for column in wanted
        )

    def columns(self, before: Collection[str]) -> set[str]:
        """The names of columns after renaming."""
        return (set(before) - set(self.names.values())) | set(self.names)

    def rename(self, row: dict[str, Any]) -> dict[str, Any]:
        taken = set(self.names.values())
        unmapped = {column: value for column, value in row.items() if column not in taken}
        return unmapped | {key: row.get(column) for key, column in self.names.items()}


def choose_layout(
    name: str, columns: Collection[str], kind: str, label: str, rows: Sequence[dict[str, Any]] = ()
) -> Layout:
    """The layout by which a file gives records of `kind`.

    Args:
        name: the source; a data set known by name has its own layout.
        columns: of the file, after renaming.
        label: the file, for errors.
        rows: some of its rows, which decide where the columns alone do not.

    Raises:
        UnknownLayoutError: no layout fits the columns.
        DataError: none that fits gives that kind.
    """
    named = named_layout(name)
    understood = [*([named] if named else []), *LAYOUTS, *_OTHERS]
    fitting = [layout for layout in understood if set(layout.required) <= set(columns)]
    for layout in fitting:
        if layout.gives(kind, rows) and layout.fits_most(rows):
            return layout
    for layout in fitting:
        if layout.gives(kind, rows):
            return layout
    listed = ", ".join(sorted(columns)) or "none"
    if fitting:
        able = " and ".join(_PLURALS[given] for given in fitting[0].kinds)
        raise DataError(
            label, f"its columns ({listed}) give {able}, not {_PLURALS[kind]}, which need {described(kind)}"
        )
    raise UnknownLayoutError(
        label,
        f"unknown layout; columns found: {listed}; understood: {described()}, {', '.join(map(str, _OTHERS))}",
    )
