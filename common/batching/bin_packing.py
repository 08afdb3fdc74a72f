"""Distributes rows over bins: of equal size, to balance ranks, or of limited size, to reduce padding."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

Bins = list[list[int]]  # each bin holds indices into the list of sizes


def balanced(sizes: Sequence[int], bins: int) -> Bins:
    """A fixed number of bins with nearly equal sums: the largest item first, each into the emptiest bin.

    This is LPT scheduling: the fullest bin is at most a third above the optimum (R. L. Graham, Bounds on
    Multiprocessing Timing Anomalies, 1969), and a few thousandths where each bin holds many items.

    Args:
        sizes: of the items, in tokens or any other unit.
    """
    dealt: Bins = [[] for _ in range(bins)]
    fullness = [(0, 0, number) for number in range(bins)]
    for index in _largest_first(sizes):
        total, count, number = fullness[0]
        dealt[number].append(index)
        heapq.heapreplace(fullness, (total + int(sizes[index]), count + 1, number))
    return dealt


def best_fit(sizes: Sequence[int], capacity: int) -> Bins:
    """Few bins with sums of at most `capacity`: the largest item first, each into the fullest bin that has room for it.

    An item larger than `capacity` gets a bin of its own.
    """
    bins: Bins = []
    free_capacities: list[tuple[int, int]] = []  # (free capacity, number of the bin), ascending
    for index in _largest_first(sizes):
        size = int(sizes[index])
        fitting = bisect_left(free_capacities, (size, 0))
        if fitting < len(free_capacities):
            free, number = free_capacities.pop(fitting)
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        insort(free_capacities, (free - size, number))
    return bins


def packed(sizes: Sequence[int], capacity: int) -> Bins:
    """As many bins as `best_fit` needs, the fullest first.

    They are balanced if they then keep to `capacity`, since equally filled bins are padded to a smaller width.
    """
    bins = best_fit(sizes, capacity)
    fill = lambda bin_: sum(int(sizes[index]) for index in bin_)
    equal = balanced(sizes, len(bins))
    if max(map(fill, equal), default=0) <= capacity:
        bins = equal
    return sorted(bins, key=fill, reverse=True)


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda index: -sizes[index])
