"""Saves a DeepSpeed engine as files of a checkpoint, and loads it again without running code from the files.

DeepSpeed's files are pickles, and DeepSpeed asks torch to trust them. Here torch loads them with `weights_only`
instead, which accepts tensors and plain values and refuses a file that could run code.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from common.checkpoints.errors import CheckpointError
from common.checkpoints.shard_writer import Shards
from common.errors import UserError, reason_of
from common.models.engine import Engine

TAG = "engine"  # DeepSpeed's name for a checkpoint within its directory
_DATA_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # overrules the weights_only=False of DeepSpeed's calls


def save_engine(engine: Engine, name: str, shards: Shards) -> None:
    """Add DeepSpeed's checkpoint of an engine, without frozen weights, to the files that this rank writes."""
    directory = str(shards.directory / name)

    def write(state_dict: dict[str, Any], path: str) -> None:
        # torch.save uses no other methods of a file than those of Writable.
        shards.add(os.path.relpath(path, shards.directory), lambda file: torch.save(state_dict, cast(BinaryIO, file)))

    def nothing(*args: object, **kwargs: object) -> None:
        """Replaces two methods: `Shards` creates directories itself, and the recovery script is not needed."""

    with (
        _replaced(engine.checkpoint_engine, save=write, makedirs=nothing),
        _replaced(engine, _copy_recovery_script=nothing),
    ):
        engine.save_checkpoint(directory, tag=TAG, save_latest=False, exclude_frozen_parameters=True)


def load_engine(engine: Engine, directory: Path) -> None:
    """Weights, optimizer and schedule as they were saved; frozen weights stay as they were loaded from the model.

    Raises:
        CheckpointError: the directory does not hold a checkpoint of this model, or holds files that could run code.
    """
    try:
        with loading_data_only(directory):
            checkpoint_path, _ = engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=False)
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # DeepSpeed does not check what it reads
        raise CheckpointError(
            directory, f"it cannot be loaded into this model ({type(error).__name__}: {reason_of(error)})"
        ) from error
    if checkpoint_path is None:
        raise CheckpointError(directory, "it is no checkpoint of this model")


@contextlib.contextmanager
def loading_data_only(directory: Path) -> Iterator[None]:
    """Within the context, torch loads only tensors and plain values, although DeepSpeed asks it to trust the file.

    Raises:
        CheckpointError: a file in `directory` holds anything else; the message names what it would call.
    """
    previous = os.environ.get(_DATA_ONLY)
    os.environ[_DATA_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(_known_classes()):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            directory, f"it holds more than data{f' ({named[1]})' if named else ''}, which could run code"
        ) from error
    finally:
        del os.environ[_DATA_ONLY]
        if previous is not None:
            os.environ[_DATA_ONLY] = previous


def _known_classes() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What DeepSpeed's files name besides tensors and plain values: classes whose objects hold only data, and what
    stands in for `getattr`."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    members: dict[str, Any] = {member.name: member for member in ZeroStageEnum}

    def member(kind: object, name: str) -> Any:
        if kind is not ZeroStageEnum or name not in members:
            raise pickle.UnpicklingError("GLOBAL builtins.getattr")
        return members[name]

    # Some versions of Python, 3.11.2 of Debian 12 among them, pickle a member of an Enum as getattr(class, name).
    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, (member, "builtins.getattr")]


@contextlib.contextmanager
def _replaced(holder: object, **attributes: object) -> Iterator[None]:
    """Within the context, `holder` has these attributes in place of those of its class."""
    vars(holder).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            delattr(holder, name)
