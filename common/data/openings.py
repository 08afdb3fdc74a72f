"""By how many of the user's turns a dialogue is told from others.

By the first one, mostly. Where many dialogues of a source begin with the same turn ("Hello"), that would give all of
them to one step and one side, so each of these is keyed by as many further turns as it takes. A prompt that continues
another goes with it, since both have the turns of the key.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.data.split import beginnings, normalised

_SHARE = 0.01  # of a source's dialogues: an opening that more of them share is extended,
_FEW = 4  # if they are more than so many: small data are not to be torn apart
_DEEPEST = 32  # turns that are looked at
_MANY = 2**21  # entries after which repeated ones are dropped


@dataclass(frozen=True)
class Key:
    """``text``: what a split hashes. ``dialogue``: 64 bits; two dialogues have the same if one rule keeps them
    together. ``turns``: how many of the user's turns the key consists of."""

    text: str
    dialogue: int
    turns: int


@dataclass(frozen=True)
class KeyRule:
    """How the dialogues of a source are keyed.

    ``split_by``: "auto", "opening" or "prompt". ``shared``: the `split.beginnings` that too many dialogues share.
    """

    split_by: str = "opening"
    shared: frozenset[int] = frozenset()

    @property
    def needs_all_turns(self) -> bool:
        """Whether more than the first turn can matter."""
        return self.split_by == "prompt" or bool(self.shared)

    def key(self, turns: Sequence[str]) -> Key:
        """The key of a dialogue by the user's turns, one at least."""
        hashes = beginnings(turns if self.needs_all_turns else turns[:1])
        count = len(turns) if self.split_by == "prompt" else 1
        while count < len(turns) and hashes[count - 1] in self.shared:
            count += 1
        text = turns[0] if count == 1 else "\0".join(map(normalised, turns[:count]))
        # All that is kept together with a dialogue which ends here is that very dialogue.
        ends = self.split_by == "prompt" or hashes[count - 1] in self.shared
        return Key(text, whole(turns) if ends else hashes[count - 1], count)


def whole(turns: Sequence[str]) -> int:
    """The hash of a dialogue as it stands, which no dialogue that continues it has."""
    return beginnings([*turns, ""])[-1]


def all_keys(turns: Sequence[str]) -> list[int]:
    """Every `Key.dialogue` that a dialogue can have, whatever the rule."""
    return beginnings([*turns, ""])


class OpeningCounter:
    """Counts the dialogues of a source in little memory: 17 bytes for each distinct beginning of one."""

    def __init__(self) -> None:
        self._hashes, self._before, self._depths = array("q"), array("q"), array("B")
        self._limit = _MANY

    def add(self, turns: Sequence[str]) -> None:
        """A dialogue, by the user's turns, one at least."""
        hashes = beginnings(turns[:_DEEPEST])
        self._hashes.extend(hashes)
        self._before.extend([0, *hashes[:-1]])
        self._depths.extend(range(len(hashes)))
        if len(self._hashes) > self._limit:
            self._distinct()
            self._limit = max(_MANY, 2 * len(self._hashes))

    def shared(self) -> frozenset[int]:
        """The beginnings that too many dialogues share. One that another continues is not counted beside it."""
        hashes, before, depths = self._distinct()
        if not len(hashes):
            return frozenset()
        later = depths > 0
        ends = ~np.isin(hashes, before[later])
        dialogues = ends.astype(np.int64)  # that begin so
        parents = np.searchsorted(hashes, before)
        for depth in range(int(depths.max()), 0, -1):
            here = depths == depth
            np.add.at(dialogues, parents[here], dialogues[here])
        return frozenset(hashes[dialogues > max(_SHARE * ends.sum(), _FEW)].tolist())

    def _distinct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hashes in order, the hash of one turn less, number of turns less one), each beginning once."""
        hashes, first = np.unique(np.frombuffer(self._hashes, np.int64), return_index=True)
        before = np.frombuffer(self._before, np.int64)[first]
        depths = np.frombuffer(self._depths, np.uint8)[first]
        self._hashes = array("q", hashes.tobytes())
        self._before = array("q", before.tobytes())
        self._depths = array("B", depths.tobytes())
        return hashes, before, depths
