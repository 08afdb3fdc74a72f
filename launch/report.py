"""Reports the results of the three steps, from metrics.jsonl and the samples in their output directories.

The TRUE reward is defined by the rule of the built-in task (`common.data.builtin`). It is known only if the held-out
questions are from that task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap
from typing import Any

from common.data.builtin import builtin_rows, true_reward
from common.data.templates import TEXT_TEMPLATES
from common.errors import UserError
from common.runtime.terminal import escape_controls

STEPS = ("sft", "reward", "ppo")
SHOWN_RESPONSES = 6
COLUMN = 36  # characters of each column of responses
QUESTION_LINES = 3  # lines shown of a question; of a longer one its end, which mostly holds what is asked
FORMAT = 1  # of summary.json


@dataclass(frozen=True)
class Change:
    """A number before training and after it."""

    before: float
    after: float


@dataclass(frozen=True)
class Truth:
    """The TRUE reward of the responses to held-out prompts. All numbers are means over prompts, from 0 to 1."""

    reward: Change
    correct: Change
    courteous: Change


@dataclass(frozen=True)
class Responses:
    """One held-out prompt, and the responses to it before and after PPO."""

    question: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """The figures of a pipeline. Those that were not evaluated are None.

    Attributes:
        perplexity: of held-out demonstrations, step 1.
        accuracy: share of held-out pairs in which the reward model prefers the chosen response, step 2.
        reward: mean raw score of the reward model over held-out prompts, step 3.
        kl: mean over responses of the KL to the reference, in nats, step 3.
        response_length: mean tokens of a response, step 3.
        truth: None also if the true reward is unknown.
        seconds: wall-clock time of each step.
        cost: of all steps, in the currency of the price; None without a price.
        answers: responses to some of the held-out prompts.
    """

    perplexity: Change | None
    accuracy: Change | None
    reward: Change | None
    kl: Change | None
    response_length: Change | None
    truth: Truth | None
    seconds: dict[str, float]
    cost: float | None
    answers: tuple[Responses, ...]


def make_report(
    sft: Path, reward: Path, ppo: Path, seconds: Sequence[float] | None = None, price_per_hour: float | None = None
) -> Report:
    """Read the output directories of the three steps.

    Args:
        seconds: wall-clock time of each step; without it, the time from opening the output directory to the end.
        price_per_hour: of the machine that the steps ran on.

    Raises:
        UserError: a step was not run to its end, or its files are damaged.
    """
    records = {name: _finished_metrics(name, directory) for name, directory in zip(STEPS, (sft, reward, ppo))}
    evaluated = any(row["phase"] == "eval" for row in records["ppo"])
    before, after = (
        [_read_rows(ppo / "samples" / f"{name}.jsonl", prompt=str, response=str) for name in ("before", "after")]
        if evaluated
        else ([], [])
    )
    # If a step was interrupted, the times in its metrics cover all its starts, and `seconds` only the last one.
    logged = [rows[-1]["seconds"] for rows in records.values()]
    times = dict(zip(STEPS, map(max, logged, seconds or logged)))

    def change(step: str, metric: str) -> Change | None:
        values = [row[metric] for row in records[step] if row["phase"] == "eval" and row.get(metric) is not None]
        return Change(values[0], values[-1]) if values else None

    return Report(
        perplexity=change("sft", "perplexity"),
        accuracy=change("reward", "accuracy"),
        reward=change("ppo", "reward"),
        kl=change("ppo", "kl"),
        response_length=change("ppo", "response_length"),
        truth=true_reward_of(before, after) if evaluated else None,
        seconds=times,
        cost=None if price_per_hour is None else sum(times.values()) / 3600 * price_per_hour,
        answers=tuple(_spread(before, after)),
    )


def true_reward_of(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> Truth | None:
    """The true reward of two sets of samples, rows with "prompt" and "response"; None if it is unknown."""
    try:
        old, new = (
            [true_reward(question_of(row["prompt"]), row["response"]) for row in rows] for rows in (before, after)
        )
    except UserError:
        return None

    def mean(name: str) -> Change:
        return Change(*(sum(float(getattr(item, name)) for item in items) / len(items) for items in (old, new)))

    return Truth(mean("reward"), mean("correct"), mean("courteous"))


def question_of(prompt: str) -> str:
    """The last question in a prompt, without the text that its template adds.

    In a prompt made by a tokenizer's own chat template, only questions of the built-in task are recognised; for others
    the result is the whole prompt.
    """
    text = "\n\n" + prompt.strip()
    for template in TEXT_TEMPLATES.values():
        if template.cue and text.endswith(template.cue):
            return text.removesuffix(template.cue).rpartition("\n\n" + template.question)[2].strip()
    return next((question for question in _builtin_questions() if question in text), text.strip())


@cache
def _builtin_questions() -> frozenset[str]:
    return frozenset(row["prompt"] for row in builtin_rows("courtesy"))


def _spread(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> Iterator[Responses]:
    pairs = list({old["prompt"]: (old, new) for old, new in zip(before, after)}.values())
    for old, new in pairs[:: max(1, len(pairs) // SHOWN_RESPONSES)][:SHOWN_RESPONSES]:
        yield Responses(question_of(old["prompt"]), old["response"].strip(), new["response"].strip())


def render(report: Report) -> str:
    """The report as text for a terminal."""
    lines = [*_figures(report), *(["", *_side_by_side(report.answers)] if report.answers else [])]
    return escape_controls("\n".join(lines))


def write_summary(report: Report, path: Path) -> None:
    """Write the report as JSON, with the number of its format."""
    values = {"format": FORMAT, **asdict(report)}
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _figures(report: Report) -> Iterator[str]:
    def row(name: str, change: Change | None, form: str = "{:.2f}") -> str:
        if change is None:
            return f"{name:<44}{'not evaluated':>20}"
        return f"{name:<44}{form.format(change.before):>10}{form.format(change.after):>10}"

    share = "{:.1%}"
    yield f"{'':<44}{'before':>10}{'after':>10}"
    yield row("step 1: perplexity", report.perplexity)
    yield row("step 2: accuracy of the reward model", report.accuracy, share)
    yield row("step 3: mean reward", report.reward)
    if report.truth is not None:
        yield row("        TRUE reward, 0 to 1", report.truth.reward)
        yield row("        answers that are correct", report.truth.correct, share)
        yield row("        answers that are courteous", report.truth.courteous, share)
    if report.kl is not None or report.reward is None:  # --kl_placement none measures none
        yield row("        KL to the fine-tuned model, nats", report.kl)
    yield row("        tokens in an answer", report.response_length, "{:.1f}")
    minutes = [seconds / 60 for seconds in report.seconds.values()]
    yield ""
    yield f"{' + '.join(f'{part:.1f}' for part in minutes)} = {sum(minutes):.1f} minutes" + (
        "" if report.cost is None else f", which cost ${report.cost:.2f}"
    )


def _side_by_side(responses: Sequence[Responses]) -> Iterator[str]:
    def columns(left: str, right: str) -> str:
        return f"  {left:<{COLUMN}} | {right}".rstrip()

    yield columns("answers before PPO", "answers after PPO")
    for item in responses:
        yield ""
        yield from _end_of(item.question)
        left, right = (wrap(text, COLUMN) or ["(nothing)"] for text in (item.before, item.after))
        yield from (columns(*lines) for lines in zip_longest(left, right, fillvalue=""))


def _end_of(question: str) -> list[str]:
    words = " ".join(question.split())
    lines = wrap(words, 2 * COLUMN + 5)
    if len(lines) <= QUESTION_LINES:
        return lines
    # Fill lines from the end backwards, so that the last line is full and the first may be short.
    lines = [line[::-1] for line in reversed(wrap(words[::-1], 2 * COLUMN + 1)[:QUESTION_LINES])]
    return [f"... {lines[0]}", *lines[1:]]


def _finished_metrics(step: str, directory: Path) -> list[dict[str, Any]]:
    """The metrics of a finished step. In an unfinished one, other files may be from an earlier run."""
    rows = _read_rows(directory / "logs" / "metrics.jsonl", phase=str, seconds=(int, float))
    if not any(row["phase"] == "done" for row in rows):
        raise UserError(
            f"{directory}: step {STEPS.index(step) + 1} ({step}) was not finished: "
            'logs/metrics.jsonl has no row "done"; run the step to its end'
        )
    return rows


def _read_rows(path: Path, **fields: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines. Raises UserError unless each has these fields, with values of these types."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): has the step been finished?") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run the step to its end") from None
    try:
        rows = [json.loads(line) for line in lines]
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{path} has a row that was not written whole: run the step to its end") from None
    if not rows:
        raise UserError(f"{path} is empty: run the step to its end")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in fields.items()):
            raise UserError(f"{path}:{number} is damaged: it has no {' and '.join(fields)}: run the step to its end")
    return rows
