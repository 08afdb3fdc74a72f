"""Decides by how many user turns a split keys a dialogue, so that related dialogues stay together.

Usually the key is the first turn. If many dialogues of a source begin with the same turn ("Hello"), that key would give
all of them to one step and one side, so each of them is keyed by as many further turns as are needed to distinguish
them. A prompt that continues another has the same key, because both begin with the turns of the key.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.data.split import normalised, prefix_hashes

# Too many dialogues share a beginning if they are more than this fraction of the source's dialogues, and more than
# _FEW, so that small data sets are not split further.
_SHARE = 0.01
_FEW = 4
_DEEPEST = 32  # the largest number of turns that is considered
_MANY = 2**21  # number of entries after which duplicates are removed


@dataclass(frozen=True)
class SplitKey:
    """The key by which a split distinguishes dialogues.

    Attributes:
        text: the text that a split hashes.
        dialogue: a 64-bit hash, the same for all dialogues that the rule keeps together.
        turns: how many of the user's turns the key consists of.
    """

    text: str
    dialogue: int
    turns: int


@dataclass(frozen=True)
class KeyRule:
    """How the dialogues of a source are keyed.

    Attributes:
        split_by: "auto", "opening" (the first turn) or "prompt" (all turns).
        shared: the `split.prefix_hashes` of beginnings that too many dialogues share, with "auto".
    """

    split_by: str = "opening"
    shared: frozenset[int] = frozenset()

    @property
    def needs_all_turns(self) -> bool:
        """Whether the key can depend on more than the first turn."""
        return self.split_by == "prompt" or bool(self.shared)

    def key(self, turns: Sequence[str]) -> SplitKey:
        """The key of a dialogue by the user's turns, at least one."""
        hashes = prefix_hashes(turns if self.needs_all_turns else turns[:1])
        count = len(turns) if self.split_by == "prompt" else 1
        while count < len(turns) and hashes[count - 1] in self.shared:
            count += 1
        text = turns[0] if count == 1 else "\0".join(map(normalised, turns[:count]))
        # A dialogue that ends within a shared beginning must not have the same key as the many that continue it.
        stands_alone = self.split_by == "prompt" or hashes[count - 1] in self.shared
        return SplitKey(text, full_dialogue_hash(turns) if stands_alone else hashes[count - 1], count)


def full_dialogue_hash(turns: Sequence[str]) -> int:
    """The hash of exactly this dialogue. A dialogue that continues it has another hash."""
    return prefix_hashes([*turns, ""])[-1]


def all_keys(turns: Sequence[str]) -> list[int]:
    """Every `SplitKey.dialogue` that a dialogue can have under any rule."""
    return prefix_hashes([*turns, ""])


class FirstTurnCounter:
    """Counts how many dialogues of a source share their first turns, in little memory: 17 bytes for each distinct
    beginning."""

    def __init__(self) -> None:
        self._hashes, self._before, self._depths = array("q"), array("q"), array("B")
        self._limit = _MANY

    def add(self, turns: Sequence[str]) -> None:
        """Count a dialogue, by the user's turns, at least one."""
        hashes = prefix_hashes(turns[:_DEEPEST])
        self._hashes.extend(hashes)
        self._before.extend([0, *hashes[:-1]])
        self._depths.extend(range(len(hashes)))
        if len(self._hashes) > self._limit:
            self._distinct()
            self._limit = max(_MANY, 2 * len(self._hashes))

    def shared(self) -> frozenset[int]:
        """The beginnings that too many dialogues share.

        Several prompts of one dialogue count once: of dialogues that continue one another, only the longest counts.
        """
        hashes, before, depths = self._distinct()
        if not len(hashes):
            return frozenset()
        later = depths > 0
        ends = ~np.isin(hashes, before[later])
        dialogues = ends.astype(np.int64)  # how many dialogues begin with each
        parents = np.searchsorted(hashes, before)
        for depth in range(int(depths.max()), 0, -1):
            at_depth = depths == depth
            np.add.at(dialogues, parents[at_depth], dialogues[at_depth])
        return frozenset(hashes[dialogues > max(_SHARE * ends.sum(), _FEW)].tolist())

    def _distinct(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(hashes in ascending order, the hash of one turn less, number of turns minus one), each beginning once."""
        hashes, first = np.unique(np.frombuffer(self._hashes, np.int64), return_index=True)
        before = np.frombuffer(self._before, np.int64)[first]
        depths = np.frombuffer(self._depths, np.uint8)[first]
        self._hashes = array("q", hashes.tobytes())
        self._before = array("q", before.tobytes())
        self._depths = array("B", depths.tobytes())
        return hashes, before, depths
