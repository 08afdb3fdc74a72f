"""Reads what a function or a service gave back: a number for each response, perhaps with figures to log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.rewards.batch import Scores
from common.rewards.errors import Failure

_LARGEST = 1e37  # scores are float32, of which sums are taken
_SHAPES = "a list with one number for each response, or such a list and a dict of figures"


class WrongAnswer(ValueError):
    """An answer that is wrong as a whole, whatever the responses; the message begins with "it"."""


def read_answer(answer: Any, responses: int) -> Scores:
    """The scores in what a reward gave for so many responses.

    Args:
        answer: a list or tuple of numbers, or a one-dimensional array or tensor; or a pair of that and a dict from
            names to numbers.

    Raises:
        WrongAnswer: it is neither, has another length, or its figures are no numbers.
    """
    figures: Mapping = {}
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
        answer, figures = answer
    if hasattr(answer, "tolist"):  # of numpy or torch
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)):
        raise WrongAnswer(f"it gave {_named(answer)} for {responses} responses: it must give {_SHAPES}")
    if len(answer) != responses:
        raise WrongAnswer(f"it gave {len(answer)} scores for {responses} responses: it must give {_SHAPES}")
    numbers, failures = [], []
    for at, value in enumerate(answer):
        number = _number(value)
        if number is None or not math.isfinite(number) or abs(number) > _LARGEST:
            failures.append(Failure(at, f"it gave {_named(value)}, which is no finite number of single precision"))
            number = 0.0
        numbers.append(number)
    return Scores(numbers, _figures(figures), tuple(failures))


def _figures(figures: Mapping) -> dict[str, float]:
    read = {}
    for name, value in figures.items():
        number = _number(value)
        if number is None or not math.isfinite(number):
            raise WrongAnswer(f"it gave {_named(value)} for the figure {str(name)[:40]!r}, which is no finite number")
        read[str(name)] = number
    return read


def _number(value: Any) -> float | None:
    if hasattr(value, "item"):  # a number of numpy, or a tensor of one
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):
            return None
    if not isinstance(value, (bool, int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _named(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float)):
        return str(value)
    return f"a {type(value).__name__}" + (f" {value[:40]!r}" if isinstance(value, str) else "")
