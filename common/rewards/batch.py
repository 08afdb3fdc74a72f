"""Defines what a reward gets, a batch of responses, and what it gives: a score for each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.rewards.errors import Failure

Messages = list[dict[str, str]]  # the turns of a dialogue: {"role": ..., "content": ...}


@dataclass(frozen=True)
class RewardBatch:
    """B responses, with all that a reward may read of them.

    Attributes:
        prompts: the prompts as text, as the actor's template renders them, without special tokens.
        messages: the dialogues that were rendered; the last turn of each is the user's, or a tool's.
        responses: as text, without special tokens.
        response_ids: the actor's ids, the end token included.
        finished: whether a response ended by itself.
        columns: the columns of the data that were kept, by name, one value for each response.
        rows: where each prompt stands in the data, as file:line.
    """

    prompts: list[str]
    messages: list[Messages]
    responses: list[str]
    response_ids: list[list[int]]
    finished: list[bool]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.responses)

    def select(self, indices: Sequence[int]) -> RewardBatch:
        """These responses alone, in this order."""
        taken = lambda values: [values[at] for at in indices]
        return RewardBatch(
            taken(self.prompts),
            taken(self.messages),
            taken(self.responses),
            taken(self.response_ids),
            taken(self.finished),
            {name: taken(values) for name, values in self.columns.items()},
            taken(self.rows) if self.rows else [],
        )

    def parts(self, size: int) -> list[list[int]]:
        """The indices of all responses, at most `size` together."""
        return [list(range(start, min(start + size, len(self)))) for start in range(0, len(self), size)]


@dataclass(frozen=True)
class Scores:
    """What a reward says of B responses.

    Attributes:
        numbers: raw scores; 0 where there is a failure.
        figures: further numbers to log, means over the responses.
        failures: the responses without a score.
    """

    numbers: list[float]
    figures: dict[str, float] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()


class BatchReward(Protocol):
    """A reward that scores a batch of responses, each by itself, in the process that calls it."""

    def score(self, batch: RewardBatch) -> Scores:
        """The scores of all responses. What is wrong with single ones is in `Scores.failures`."""

    def close(self) -> None:
        """End what the reward has started."""


def columns_in(kept: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The kept columns by name, from what is kept of each row; None where a row has none."""
    names = dict.fromkeys(name for row in kept for name in row["columns"])
    return {name: [row["columns"].get(name) for row in kept] for name in names}


def trial_batch(kept: Sequence[str], prompts: Sequence[str], response: str, response_ids: list[int]) -> RewardBatch:
    """One made-up response to each of a few prompts, to try a reward with.

    Args:
        kept: what is kept of the prompts' rows, as `common.data.keeping.kept_json` writes it.
    """
    rows = [json.loads(text) for text in kept]
    count = len(rows)
    return RewardBatch(
        list(prompts),
        [row["messages"] for row in rows],
        [response] * count,
        [list(response_ids) for _ in rows],
        [True] * count,
        columns_in(rows),
        [row["row"] for row in rows],
    )


def merged(total: int, parts: Iterable[tuple[Sequence[int], Scores]]) -> Scores:
    """The scores of `total` responses from those of parts: (indices among all, scores of these)."""
    numbers, failures = [0.0] * total, []
    figures: list[tuple[int, Mapping[str, float]]] = []
    for indices, scores in parts:
        for at, number in zip(indices, scores.numbers):
            numbers[at] = number
        failures += [Failure(indices[failure.response], failure.why) for failure in scores.failures]
        figures.append((len(indices), scores.figures))
    ordered = sorted(failures, key=lambda failure: failure.response)
    return Scores(numbers, mean_figures(figures), tuple(ordered))


def mean_figures(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The means of figures over parts, each (responses, figures), weighted by the responses of those that have it."""
    sums: dict[str, tuple[float, int]] = {}
    for responses, figures in parts:
        for name, value in figures.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + responses * value, count + responses
    return {name: total / count for name, (total, count) in sums.items()}
