"""Trains a supervised task on streamed rows: what changes of a run, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.batching.sampler import StepSampler
from common.batching.streamed_steps import StreamedSteps
from common.checkpoints.training_state import TrainingState
from common.data.options import DataOptions
from common.data.request import DataRequest
from common.data.streaming import Block, Place, RowStream

_STREAM = "stream"  # key, in a checkpoint's `state_dict`, of the place of the stream


@dataclass(frozen=True)
class Streaming:
    """Streamed rows, and how long a run over them is.

    Attributes:
        rows: without end.
        steps: optimizer steps of the run.
    """

    rows: RowStream
    steps: int


def streamed(requests: Sequence[DataRequest]) -> list[DataRequest]:
    """The same requests, of sources that are streamed."""
    return [
        replace(request, data_path=[replace(spec, streamed=True) for spec in request.data_path]) for request in requests
    ]


def first_rows(requests: Sequence[DataRequest], rows: int) -> list[DataRequest]:
    """The requests for the first rows of each source."""
    return [replace(request, max_rows=min(rows, request.max_rows or rows)) for request in requests]


def streamed_steps(streaming: Streaming, sampler: StepSampler, config: DataOptions) -> StreamedSteps:
    """The optimizer steps of a run over streamed rows; `sampler` divides each among ranks and micro-batches."""

    def blocks(place: Place | None) -> Iterator[Block]:
        reading = streaming.rows.blocks(place)
        while True:
            with config.naming_flags():
                block = next(reading)
            yield block

    return StreamedSteps(blocks, sampler, streaming.steps)


def with_place(state: TrainingState, steps: StreamedSteps) -> TrainingState:
    """The state of a run and the place of its stream, which a resumed run goes on from."""

    def load_state_dict(values: dict[str, Any]) -> None:
        state.load_state_dict(values)
        steps.place = values[_STREAM]

    return replace(
        state, state_dict=lambda: {**state.state_dict(), _STREAM: steps.place}, load_state_dict=load_state_dict
    )
