"""Forms optimizer steps of streamed rows: rank 0 reads them, every rank gets the rows of one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import pyarrow
from datasets import Dataset

from common.batching.sampler import MicroBatch, StepSampler
from common.data.streaming import Block, Place
from common.errors import UserError
from common.runtime.distributed import from_main, is_main, say


class StreamedRows:
    """Stands for the Dataset of all training rows where they are streamed: it has the rows of the current step.

    Attributes:
        current: those rows.
    """

    current: Dataset

    def __getitem__(self, rows: list[int]) -> dict[str, list[Any]]:
        return self.current[rows]

    @property
    def column_names(self) -> list[str]:
        return self.current.column_names


class StreamedSteps:
    """The optimizer steps of a run over streamed rows, as one rank sees them.

    What a step consists of does not depend on the ranks. The next block is read while steps are made of this one.

    Args:
        blocks: gives the blocks from a place on, without end; `RowStream.blocks`.
        sampler: divides the rows of a step among ranks and micro-batches.
        total: steps of the run.

    Attributes:
        rows: gets the rows of each step, which its micro-batches are numbers of.
        place: where a run goes on from after the last step; on rank 0 alone.
    """

    def __init__(self, blocks: Callable[[Place | None], Iterator[Block]], sampler: StepSampler, total: int):
        self._blocks_from, self._sampler, self.steps_per_epoch = blocks, sampler, total
        self.rows = StreamedRows()
        self.place: Place | None = None

    def steps(self, epochs: int, done: int = 0) -> Iterator[list[MicroBatch]]:
        """The steps without the first `done`; there is one epoch, however many passes over the sources it takes.

        Raises:
            UserError: on all ranks alike, if rank 0 cannot read on.
        """
        tables: Iterator[Any] = self._tables(done) if is_main() else repeat(None)
        for _ in range(done, self.steps_per_epoch):
            table = from_main(_or_error(tables))
            if isinstance(table, UserError):
                raise table
            self.rows.current = Dataset(table)
            (micro_batches,) = self._sampler.over(self.rows.current["length"]).epoch(0)
            yield micro_batches

    def _tables(self, done: int) -> Iterator[pyarrow.Table]:
        """The rows of each step from number `done` on; sets `place` to where those after them are."""
        rows_per_step = self._sampler.rows_per_step
        position, end = done * rows_per_step, self.steps_per_epoch * rows_per_step
        left: pyarrow.Table | None = None
        for block in self._blocks(end):
            for note in block.notes:
                say(note)
            fresh = block.rows.slice(max(position - block.first, 0))
            left = fresh if left is None else pyarrow.concat_tables([left, fresh])
            while len(left) >= rows_per_step:
                # What follows these rows is in this block: fewer rows than a step has were left of the one before.
                self.place = block.place
                yield left.take(list(range(rows_per_step)))  # a slice would be sent with all that it was cut from
                left = left.slice(rows_per_step)

    def _blocks(self, end: int) -> Iterator[Block]:
        """The blocks up to the row with the number `end`; each is read ahead, by a thread."""
        blocks = self._blocks_from(self.place)
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(next, blocks)
            while True:
                block = upcoming.result()
                if block.first + len(block.rows) >= end:
                    yield block
                    return
                upcoming = reader.submit(next, blocks)
                yield block


def _or_error(tables: Iterator[Any]) -> Any:
    """The next table, or the error that reading it gave, as one that can be sent to other ranks."""
    try:
        return next(tables)
    except UserError as error:
        return UserError(str(error))
