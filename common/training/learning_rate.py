"""The learning rate of each optimizer step, as a share of the highest. Pure functions.

The schedules are those of transformers, under the same names, but for the first step: there it has the rate 0.
"""

from __future__ import annotations

import math

_POLYNOMIAL_END = 1e-4  # the share of the highest rate that the step after the last would take


def share_of_highest(schedule: str, step: int, warmup: int, total: int) -> float:
    """The factor of the highest learning rate in one optimizer step, above 0 and at most 1.

    In the warm-up it rises: 1/warmup, 2/warmup, ... 1. Afterwards it falls from 1 towards 0, which the step after the
    last would take. `polynomial` has the power 1; `cosine_with_restarts` has one cycle, so nothing restarts.

    Args:
        schedule: one of `common.config.groups.SCHEDULES`.
        step: number of the optimizer step, from 0.
        warmup: optimizer steps of the warm-up; at most `total` of them are made.
        total: optimizer steps of the run.
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
