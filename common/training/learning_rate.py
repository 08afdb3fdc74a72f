"""Computes the learning rate of each optimizer step, as a fraction of the peak rate. Pure functions.

The schedules and their names are those of transformers. The only difference: transformers gives the first step the
rate 0, and here it has a rate above 0.
"""

from __future__ import annotations

import math

_POLYNOMIAL_END = 1e-4  # the fraction of the peak rate that the step after the last would have


def fraction_of_peak(schedule: str, step: int, warmup: int, total: int) -> float:
    """The learning rate of one optimizer step, as a fraction of the peak rate: above 0 and at most 1.

    In the warm-up it rises: 1/warmup, 2/warmup, ... 1. Afterwards it falls from 1 towards 0; the step after the last
    would have 0. `polynomial` has the power 1; `cosine_with_restarts` has one cycle, so nothing restarts.

    Args:
        schedule: one of `common.config.groups.SCHEDULES`.
        step: number of the optimizer step, from 0.
        warmup: optimizer steps of the warm-up; if it is above `total`, it counts as `total`.
        total: optimizer steps of the run.
    """
    if schedule == "constant":
        return 1.0
    warmup = min(warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant_with_warmup":
        return 1.0
    remaining = 1 - min(step - warmup, total - warmup) / max(total - warmup, 1)
    if schedule == "polynomial":
        return _POLYNOMIAL_END + (1 - _POLYNOMIAL_END) * remaining
    return remaining if schedule == "linear" else (1 - math.cos(math.pi * remaining)) / 2
