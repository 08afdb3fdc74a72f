"""Defines what a run gives to its checkpoints, and gets back when it is resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from common.models.engine import Engine
from common.training.atomic_step import AtomicStep


class RunLog(Protocol):
    """The metrics of a run. A checkpoint records where they end, so that a resumed run continues there.

    `common.artifacts.tracking.Tracker` is one.
    """

    def begin(self, place: Mapping[str, float] | None = None) -> None:
        """Start writing: at `place`, which the method `place` returned for a checkpoint, or from an empty file."""

    def place(self, step: int) -> dict[str, float]:
        """Where the metrics end after `step`, as numbers for JSON: "step", "bytes" and "seconds"."""

    def lost(self) -> str | None:
        """Why the output directory cannot be used any more, or None while it can."""


@dataclass
class TrainingState:
    """What a checkpoint holds.

    Attributes:
        engines: by name; DeepSpeed saves and loads them.
        tensors: returns this rank's own tensors by name. They are saved, and written in place when a run is resumed.
        reshape: sets the tensors from a checkpoint that another number of ranks saved. Its argument maps the name of a
            tensor to the list of that tensor from every rank that saved it.
        state_dict: returns values for JSON.
        load_state_dict: is given these values when a run is resumed.
        last_step_applied: whether the last optimizer step was applied. No checkpoint is taken after a skipped step,
            because the weights may be damaged.
    """

    engines: Mapping[str, Engine]
    tensors: Callable[[], dict[str, torch.Tensor]] = dict
    reshape: Callable[[Callable[[str], list[torch.Tensor]]], None] = lambda parts_of: None
    state_dict: Callable[[], dict[str, Any]] = dict
    load_state_dict: Callable[[dict[str, Any]], None] = lambda values: None
    last_step_applied: Callable[[], bool] = lambda: True

    @classmethod
    def of_one_engine(cls, engine: Engine, step: AtomicStep, **values: Any) -> TrainingState:
        """The state of a step that trains one model: the engine, the counters of its optimizer steps, and `values`."""
        return cls(
            {"model": engine},
            state_dict=lambda: {**step.state_dict(), **values},
            load_state_dict=step.load_state_dict,
            last_step_applied=step.last_step_applied,
        )
