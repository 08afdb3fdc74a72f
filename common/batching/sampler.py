"""Chooses which rows form which optimizer step, on which rank and in which micro-batch.

The rows of a step are drawn at random, without replacement within an epoch. Only within a step are rows sorted by
length and balanced, so that little is padded and every rank gets the same number of batches with about the same number
of tokens. What an optimizer step consists of depends on the seed, the epoch and its size only: the same run on another
number of ranks, or cut into micro-batches in another way, sees the same steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from common.batching.bin_packing import balanced, packed


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        indices: the rows' numbers in the data set.
        real: False for a filler, a repeated row that must not count.
        packs: how many rows share each sequence, one after another; empty where every row has its own.
    """

    indices: tuple[int, ...]
    real: tuple[bool, ...]
    packs: tuple[int, ...] = ()


class StepSampler:
    """The optimizer steps of an epoch, as one rank sees them.

    Every row occurs once in an epoch, over all ranks; fillers complete the last step.

    Args:
        lengths: tokens of each row; for a pair, those of both sequences, padded to the longer one.
        rows_per_micro_batch: rows of one forward pass on one rank.
        micro_batches_per_step: gradient accumulation.
        world_size, rank: each step is divided among the ranks.
        seed: of the order; each epoch has its own order.
        max_tokens: if not 0, the same steps are cut into as few micro-batches as possible, each of any number of rows
            and at most so many padded tokens; see `token_budget_batches`.
        pack_to: if not 0, rows share sequences of so many tokens. A micro-batch then has at most `rows_per_micro_batch`
            sequences, or as many as `max_tokens` have room for.
        group_by_length: rows of similar length form a step. Less is padded, but a step is no longer a random sample of
            the data: its mean length, and with it the weight of each token in the loss, varies from step to step.
    """

    # With group_by_length rows are sorted among so many steps' worth of rows, and at most among a quarter of the epoch:
    # sorting a whole epoch would put the same rows together in every epoch.
    _STEPS_SORTED_TOGETHER = 50

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        rows_per_micro_batch: int,
        micro_batches_per_step: int,
        world_size: int,
        rank: int,
        seed: int,
        max_tokens: int = 0,
        pack_to: int = 0,
        group_by_length: bool = False,
    ):
        if not 0 <= rank < world_size or min(rows_per_micro_batch, micro_batches_per_step, len(lengths)) < 1:
            raise ValueError("a sampler needs rows, positive batch sizes and a rank below the world size")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._rows = rows_per_micro_batch
        self._micro_batches = micro_batches_per_step
        self._world_size = world_size
        self._rank = rank
        self._seed = seed
        self._max_tokens = max_tokens
        self._group_by_length = group_by_length
        self._pack_to = min(pack_to, max_tokens) if max_tokens else pack_to
        self._global_rows = rows_per_micro_batch * micro_batches_per_step * world_size

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self._lengths), self._global_rows)

    @property
    def rows_per_step(self) -> int:
        """Rows of a whole step, over all ranks."""
        return self._global_rows

    def over(self, lengths: Sequence[int]) -> StepSampler:
        """A sampler that divides other rows, of these lengths, in the same way."""
        other = copy.copy(self)
        other._lengths = np.asarray(lengths, dtype=np.int64)
        return other

    def steps(self, epochs: int, done: int = 0) -> Iterator[list[MicroBatch]]:
        """The steps of so many epochs, one after another, without the first `done`."""
        return islice((step for epoch in range(epochs) for step in self.epoch(epoch)), done, None)

    def epoch(self, epoch: int) -> list[list[MicroBatch]]:
        """This rank's micro-batches, one inner list per optimizer step."""
        return [self._share_of_step(rows) for rows in self._global_batches(epoch)]

    def _global_batches(self, epoch: int) -> list[np.ndarray]:
        """The rows of each step, longest first; independent of ranks and micro-batches."""
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._lengths))
        if not self._group_by_length:
            return [
                _longest_first(order[start : start + self._global_rows], self._lengths)
                for start in range(0, len(order), self._global_rows)
            ]
        together = min(max(self.steps_per_epoch // 4, 1), self._STEPS_SORTED_TOGETHER) * self._global_rows
        steps: list[np.ndarray] = []
        for start in range(0, len(order), together):
            rows = _longest_first(order[start : start + together], self._lengths)
            steps += [rows[i : i + self._global_rows] for i in range(0, len(rows), self._global_rows)]
        return [steps[i] for i in random.permutation(len(steps))]

    def _share_of_step(self, rows: np.ndarray) -> list[MicroBatch]:
        """This rank's share of a step. At any time all ranks have rows of similar length; the rank that has the longest
        rows of one round has the shortest of the next."""
        if self._pack_to:
            sequences = self._max_tokens // self._pack_to if self._max_tokens else self._rows
            return _packed_batches(rows, self._lengths, self._pack_to, sequences, self._world_size, self._rank)
        if self._max_tokens:
            return _within_budget(rows, self._lengths, self._max_tokens, self._world_size, self._rank)
        batches = _batches(rows, self._rows, count=self._micro_batches * self._world_size)
        rounds = [batches[i : i + self._world_size] for i in range(0, len(batches), self._world_size)]
        return [dealt[self._rank if number % 2 == 0 else -1 - self._rank] for number, dealt in enumerate(rounds)]


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    """Steps that take every row once; the last has what is left."""
    return -(-rows // rows_per_step)


def evaluation_batches(
    lengths: Sequence[int],
    rows_per_batch: int,
    world_size: int,
    rank: int,
    max_batches: int | None = None,
    pack_to: int = 0,
) -> list[MicroBatch]:
    """This rank's batches of an evaluation: every row once over all ranks, the same number of batches on each rank.

    The longest rows come first, so that a lack of memory shows at once. `max_batches` limits the batches of all ranks
    together: they are chosen evenly from the longest to the shortest, and are the same on any number of ranks.

    Args:
        pack_to: if not 0, rows share sequences of so many tokens, and a batch has `rows_per_batch` sequences at most.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    rows = _longest_first(np.arange(len(sizes)), sizes)
    if not len(rows):
        return []
    if pack_to:
        batches = _packed_batches(rows, sizes, pack_to, rows_per_batch, 1, 0)
    else:
        batches = _batches(rows, rows_per_batch, count=-(-len(rows) // rows_per_batch))
    if max_batches is not None and max_batches < len(batches):
        batches = [batches[i * len(batches) // max_batches] for i in range(max_batches)]
    filler = replace(batches[-1], real=(False,) * len(batches[-1].indices))
    return (batches + [filler] * (-len(batches) % world_size))[rank::world_size]


def token_budget_batches(lengths: Sequence[int], max_tokens: int, world_size: int, rank: int) -> list[MicroBatch]:
    """This rank's batches, each of at most `max_tokens` padded tokens or of one longer row; the longest rows first.

    Every row occurs once over all ranks. All ranks have about the same number of tokens and exactly the same number of
    batches, since ZeRO-3 gathers parameters for a batch on all ranks together.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    rows = _longest_first(np.arange(len(sizes)), sizes)
    return _within_budget(rows, sizes, max_tokens, world_size, rank) if len(rows) else []


def _within_budget(
    rows: np.ndarray, lengths: np.ndarray, max_tokens: int, world_size: int, rank: int
) -> list[MicroBatch]:
    shares = [_cut(rows[share], lengths, max_tokens) for share in balanced(lengths[rows].tolist(), world_size)]
    count = max(map(len, shares))
    groups = shares[rank]
    while len(groups) < count and (divisible := [number for number, group in enumerate(groups) if len(group) > 1]):
        number = max(divisible, key=lambda number: len(groups[number]) * lengths[groups[number][0]])
        half = len(groups[number]) // 2
        groups[number : number + 1] = groups[number][:half], groups[number][half:]
    batches = [MicroBatch(tuple(group.tolist()), (True,) * len(group)) for group in groups]
    return batches + [MicroBatch((int(rows[-1]),), (False,))] * (count - len(batches))


def _packed_batches(
    rows: np.ndarray, lengths: np.ndarray, pack_to: int, sequences_per_batch: int, world_size: int, rank: int
) -> list[MicroBatch]:
    shares = [rows[share] for share in balanced(lengths[rows].tolist(), world_size)]
    sequences = [packed(lengths[share].tolist(), pack_to) for share in shares]
    count = max(-(-len(bins) // sequences_per_batch) for bins in sequences)
    batches = []
    for numbers in np.array_split(np.arange(len(sequences[rank])), count):
        packs = [shares[rank][sequences[rank][number]] for number in numbers]
        indices = tuple(int(row) for pack in packs for row in pack)
        batches.append(
            MicroBatch(indices, (True,) * len(indices), tuple(map(len, packs)))
            if packs
            else MicroBatch((int(rows[-1]),), (False,), (1,))
        )
    return batches


def _cut(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Rows, longest first, in as few consecutive groups of at most `max_tokens` padded tokens as possible."""
    groups = []
    while len(rows):
        taken = max(max_tokens // int(lengths[rows[0]]), 1)
        groups.append(rows[:taken])
        rows = rows[taken:]
    return groups


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-lengths[rows], kind="stable")]


def _batches(rows: np.ndarray, rows_per_batch: int, count: int) -> list[MicroBatch]:
    """`count` batches of consecutive rows; places that are left over are filled with the last (shortest) row."""
    filled = rows.tolist() + [int(rows[-1])] * (count * rows_per_batch - len(rows))
    real = [place < len(rows) for place in range(len(filled))]
    return [
        MicroBatch(tuple(filled[i : i + rows_per_batch]), tuple(real[i : i + rows_per_batch]))
        for i in range(0, len(filled), rows_per_batch)
    ]
