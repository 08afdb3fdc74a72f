"""Rows into bins: of like size, so that no rank waits for another, or of limited size, so that little is padded."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

Bins = list[list[int]]  # of places in a list of sizes


def balanced(sizes: Sequence[int], bins: int) -> Bins:
    """So many bins, their sums as equal as dealing the largest first to the emptiest makes them.

    At most a third above the best there is (R. L. Graham, 1969); a few thousandths where each holds many.
    """
    dealt: Bins = [[] for _ in range(bins)]
    fullness = [(0, 0, number) for number in range(bins)]
    for place in _largest_first(sizes):
        total, count, number = fullness[0]
        dealt[number].append(place)
        heapq.heapreplace(fullness, (total + int(sizes[place]), count + 1, number))
    return dealt


def best_fit(sizes: Sequence[int], capacity: int) -> Bins:
    """The largest first, each into the fullest bin with room for it: few bins. What is above `capacity` goes alone."""
    bins: Bins = []
    rooms: list[tuple[int, int]] = []  # (what is left, number of the bin), ascending
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
    """As few bins as `best_fit` needs, but filled alike where that fits too: then all are narrower. Fullest first."""
    bins = best_fit(sizes, capacity)
    fill = lambda bin_: sum(int(sizes[place]) for place in bin_)
    alike = balanced(sizes, len(bins))
    if max(map(fill, alike), default=0) <= capacity:
        bins = alike
    return sorted(bins, key=fill, reverse=True)


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda place: -sizes[place])
