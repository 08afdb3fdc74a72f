"""Defines what can be wrong with a reward: before a run, and with single responses during it."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import InputError


class RewardError(InputError):
    """A reward that cannot be used: it does not exist, cannot be called, or gave no scores when it was tried.
    `subject` is its name."""


@dataclass(frozen=True)
class Failure:
    """A response that a reward gave no score.

    Attributes:
        response: its index in the batch.
        why: begins with "it", for the reward: "it gave None".
    """

    response: int
    why: str

    def line(self, name: str, number: int, row: str) -> str:
        """The failure in one line.

        Args:
            name: of the reward.
            number: of the response, from 1, among all of an iteration.
            row: where the prompt stands in the data, as file:line; '' if that is not known.
        """
        of_row = f" to the prompt in {row}" if row else ""
        return f"{name}, on response {number}{of_row}: {self.why}"
