"""Rows into bins: of like size, so that no rank waits for another, or of limited size, so that little is padded."""
from __future__ import annotations

import heapq
from collections.abc import Sequence

Bins = list[list[int]]


def balanced(sizes: Sequence[int], bins: int) -> Bins:
    """So many bins of places in `sizes`, their sums as equal as dealing the largest first to the emptiest makes them.

    At most a third above the best there is (R. L. Graham, 1969); a few thousandths where each holds many.
    """
    dealt: Bins = [[] for _ in range(bins)]
    fullness = [(0, 0, number) for number in range(bins)]
    for place in _largest_first(sizes):
        total, count, number = fullness[0]
        dealt[number].append(place)
        heapq.heapreplace(fullness, (total + int(sizes[place]), count + 1, number))
    return dealt


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda place: -sizes[place])
