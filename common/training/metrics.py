"""Adds statistics over micro-batches and ranks as sums, and computes means from them once, at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Metrics = dict[str, float]  # what is logged, by name
StepMetrics = dict[str, float | None]  # of an optimizer step; None: DeepSpeed keeps no gradient norm
Sums = dict[str, Tensor]  # name -> float64 scalar: a total over elements, never a mean
GlobalSum = Callable[[Tensor], Tensor]  # returns the sum over all ranks of a tensor of the same shape on each


class Recorder(Protocol):
    """Where a training loop writes; `common.artifacts.tracking.Tracker` is one."""

    def log(self, phase: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record metrics of a phase ("train", "eval", "done") at a step."""

    def progress(self, total: int, what: str, done: int = 0) -> Any:
        """A tqdm bar over `total` steps, of which `done` are done."""


def on_this_rank(tensor: Tensor) -> Tensor:
    """The `GlobalSum` of a single rank."""
    return tensor


def masked_sum(tensor: Tensor, mask: Tensor) -> Tensor:
    """Sum of `tensor` where `mask` (bool, same shape) is true: a float64 scalar without a gradient.

    Values outside the mask may be anything, NaN included.
    """
    return tensor.detach().masked_fill(~mask, 0).sum(dtype=torch.float64)


def add_sums(parts: Sequence[Sums], global_sum: GlobalSum = on_this_rank) -> Sums:
    """Add statistics of equal names over micro-batches and, in a single reduction, over ranks.

    Args:
        parts: of each micro-batch; all have the same names.
    """
    names = sorted(parts[0])
    totals = global_sum(torch.stack([torch.stack([part[name] for name in names]) for part in parts]).sum(0))
    return dict(zip(names, totals))


def means(sums: Sums, count: str) -> dict[str, float]:
    """Every sum divided by the sum named `count`, which is left out. If that is 0, the means are 0."""
    divisor = max(float(sums[count]), 1.0)
    return {name: float(total) / divisor for name, total in sums.items() if name != count}
