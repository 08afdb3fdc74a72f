"""The scale in which scores and values are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError
from common.models.calibration import RAW, Calibration
from common.runtime.distributed import say


class ScoreScale:
    """Mean and standard deviation of the raw scores; scores and values are measured in these.

    The critic holds the same object: once the scale is measured, its values are in it too.

    Args:
        calibration: the scale, where it is known from the start (`RAW` leaves scores as they are); None: it is measured
            on the scores of the first iteration and of the evaluation before it. Until then scores are raw.
    """

    def __init__(self, calibration: Calibration | None):
        self.calibration = calibration
        self._observed: list[Tensor] = []

    @property
    def known(self) -> bool:
        return self.calibration is not None

    @property
    def current(self) -> Calibration:
        """The calibration, or `RAW` as long as it is not known."""
        return self.calibration or RAW

    def normalise(self, numbers: Tensor) -> Tensor:
        """(numbers - mean) / std, of any shape."""
        return self.current.normalise(numbers)

    def observe(self, scores: Tensor) -> None:
        """Count raw scores (B,) in when the scale is measured."""
        self._observed.append(scores)

    def measure(self, scores: Tensor) -> None:
        """Set the scale from raw scores (B,) and those observed before, the same on every rank.

        Raises:
            UserError: on all ranks alike, if the scores do not vary.
        """
        scores = torch.cat([*self._observed, scores])
        measured = Calibration.of(scores)
        if not measured.usable:
            raise UserError(
                f"the {len(scores)} scores of the first rollouts have the mean {measured.mean:g} and the "
                f"standard deviation {measured.std:g}, which nothing can be measured in: give an iteration "
                "more answers, or add --score_calibration none"
            )
        self.calibration = measured
        say(
            f"the {len(scores)} scores of the first rollouts have the mean {measured.mean:.4g} and the spread "
            f"{measured.std:.4g}: from here on scores and values are measured in these"
        )

    def state_dict(self) -> list[float] | None:
        return None if self.calibration is None else [self.calibration.mean, self.calibration.std]

    def load_state_dict(self, state: list[float] | None) -> None:
        if state is not None:
            self.calibration = Calibration(*state)
