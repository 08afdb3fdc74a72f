"""Loads a checkpoint that the same number of ranks saved. For another number of ranks see `reshard`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.checkpoints.engine_state import load_engine
from common.checkpoints.errors import CheckpointError
from common.checkpoints.state import RANDOM_STATE, rank_file
from common.checkpoints.training_state import TrainingState
from common.errors import reason_of
from common.runtime.distributed import on_gpu, rank

_CUDA_RANDOM_STATE = "random.cuda"


def load(path: Path, state: TrainingState) -> None:
    """Load the checkpoint at `path` into the engines and tensors of `state`, and set this rank's random state.

    Raises:
        CheckpointError: the checkpoint is not one of this run's models.
    """
    for name, engine in state.engines.items():
        load_engine(engine, path / name)
    with naming_checkpoint(path):
        tensors = load_file(path / rank_file(rank()))
        for name, tensor in state.tensors().items():
            tensor.copy_(tensors[f"state.{name}"])
        _set_random_state(tensors)


@contextmanager
def naming_checkpoint(path: Path) -> Iterator[None]:
    """Within the context, an error about the checkpoint's content becomes a CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            path, f"it does not hold what this run needs ({type(error).__name__}: {reason_of(error)})"
        ) from error


def random_state() -> dict[str, torch.Tensor]:
    """This rank's random state, as tensors by name."""
    states = {RANDOM_STATE: torch.get_rng_state()}
    if on_gpu():
        states[_CUDA_RANDOM_STATE] = torch.cuda.get_rng_state()
    return states


def _set_random_state(tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors[RANDOM_STATE])
    if on_gpu() and _CUDA_RANDOM_STATE in tensors:
        torch.cuda.set_rng_state(tensors[_CUDA_RANDOM_STATE])
