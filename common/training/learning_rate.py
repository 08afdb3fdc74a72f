"""The learning rate of each optimizer step, as a share of the highest. Pure functions; see transformers' schedules of
the same names, which begin with a step at the rate 0."""

from __future__ import annotations

import math

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
_POLYNOMIAL_END = 1e-4  # what is left of the rate after the last step


def share_of_highest(schedule: str, step: int, warmup: int, total: int) -> float:
    """What optimizer step `step`, from 0, of a run of `total` multiplies the highest learning rate by.

    The steps of the warm-up take 1/warmup, 2/warmup, ... 1 of it; a warm-up longer than the run takes all
    of it. Afterwards it falls from 1 towards 0, which the step after the last would take; no step of a run takes 0.
    `polynomial` is of power 1, and `cosine_with_restarts` has one cycle, so nothing restarts.
    """
    if schedule == "constant":
        return 1.0
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant_with_warmup":
        return 1.0
    left = 1 - min(step - warmup, total - warmup) / max(total - warmup, 1)
    if schedule == "polynomial":
        return _POLYNOMIAL_END + (1 - _POLYNOMIAL_END) * left
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
