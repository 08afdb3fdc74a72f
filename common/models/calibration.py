"""Defines the scale of a reward model's scores. Rewards and values are measured in it, whatever the raw range is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

Scores = TypeVar("Scores", float, torch.Tensor)


@dataclass(frozen=True)
class Calibration:
    """Mean and standard deviation of a reward model's raw scores."""

    mean: float
    std: float

    def normalise(self, scores: Scores) -> Scores:
        """(scores - mean) / std, for a number or a tensor of any shape."""
        return (scores - self.mean) / self.std

    @classmethod
    def of(cls, scores: torch.Tensor) -> Calibration:
        """The calibration that raw scores (B,) give: their mean and population standard deviation, in fp64."""
        scores = scores.double()
        return cls(float(scores.mean()), float(scores.std(correction=0)))

    @property
    def usable(self) -> bool:
        """Whether fp32 can tell normalised scores apart."""
        return self.std > 0 and abs(self.mean) / self.std < 2**20 and max(abs(self.mean), self.std, 1 / self.std) < 1e30


RAW = Calibration(0.0, 1.0)  # leaves scores as they are
