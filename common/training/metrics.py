"""Adds statistics over micro-batches and ranks as sums, and computes means from them once, at the end.

A statistic whose name ends in `MAXIMUM` is merged by its maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Metrics = dict[str, float]  # what is logged, by name
StepMetrics = dict[str, float | None]  # of an optimizer step; None: DeepSpeed keeps no gradient norm
MAXIMUM = "_max"
Sums = dict[str, Tensor]  # name -> float64 scalar: a total over elements or, if so named, a maximum, never a mean
GlobalSum = Callable[[Tensor], Tensor]  # returns the sum over all ranks of a tensor of the same shape on each
GlobalMax = Callable[[Tensor], Tensor]  # returns the maximum over all ranks, number by number


class Recorder(Protocol):
    """Where a training loop writes; `common.artifacts.tracking.Tracker` is one."""

    def log(self, phase: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record metrics of a phase ("train", "eval", "done") at a step."""

    def progress(self, total: int, what: str, done: int = 0) -> Any:
        """A tqdm bar over `total` steps, of which `done` are done."""


def on_this_rank(tensor: Tensor) -> Tensor:
    """The `GlobalSum` and the `GlobalMax` of a single rank."""
    return tensor


def masked_sum(tensor: Tensor, mask: Tensor) -> Tensor:
    """Sum of `tensor` where `mask` (bool, same shape) is true: a float64 scalar without a gradient.

    Values outside the mask may be anything, NaN included.
    """
    return tensor.detach().masked_fill(~mask, 0).sum(dtype=torch.float64)


def add_sums(parts: Sequence[Sums], global_sum: GlobalSum = on_this_rank, global_max: GlobalMax = on_this_rank) -> Sums:
    """Merge statistics of equal names over micro-batches and, in one reduction for sums and one for maxima, over ranks.

    Args:
        parts: of each micro-batch; all have the same names.
        global_max: not called where there are no maxima.
    """
    names = sorted(parts[0])
    table = torch.stack([torch.stack([part[name] for name in names]) for part in parts])
    maxima = [name.endswith(MAXIMUM) for name in names]
    totals = global_sum(table.sum(0))
    if any(maxima):
        largest = global_max(table.amax(0))
        totals = totals.where(~torch.tensor(maxima, device=totals.device), largest)
    return dict(zip(names, totals))


def means(sums: Sums, count: str) -> dict[str, float]:
    """Every sum divided by the sum named `count`, which is left out. If that is 0, the means are 0."""
    divisor = max(float(sums[count]), 1.0)
    return {name: float(total) / divisor for name, total in sums.items() if name != count}
