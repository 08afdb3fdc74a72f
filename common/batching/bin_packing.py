"""Rows into bins: of equal size, so that no rank waits for another, or of limited size, so that little is padded."""

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
    for place in _largest_first(sizes):
        total, count, number = fullness[0]
        dealt[number].append(place)
        heapq.heapreplace(fullness, (total + int(sizes[place]), count + 1, number))
    return dealt


def best_fit(sizes: Sequence[int], capacity: int) -> Bins:
    """Few bins with sums of at most `capacity`: the largest item first, each into the fullest bin that has room for it.

    An item larger than `capacity` gets a bin of its own.
    """
    bins: Bins = []
    rooms: list[tuple[int, int]] = []  # (free capacity, number of the bin), ascending
    for place in _largest_first(sizes):
        size = int(sizes[place])
        fitting = bisect_left(rooms, (size, 0))
        if fitting < len(rooms):
            room, number = rooms.pop(fitting)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(place)
        insort(rooms, (room - size, number))
    return bins


def packed(sizes: Sequence[int], capacity: int) -> Bins:
    """As many bins as `best_fit` needs, the fullest first.

    They are balanced if they then keep to `capacity`, since equally filled bins are padded to a smaller width.
    """
    bins = best_fit(sizes, capacity)
    fill = lambda bin_: sum(int(sizes[place]) for place in bin_)
    equal = balanced(sizes, len(bins))
    if max(map(fill, equal), default=0) <= capacity:
        bins = equal
    return sorted(bins, key=fill, reverse=True)


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda place: -sizes[place])
