"""A DeepSpeed engine in a checkpoint: its files are written as shards, and read as data only.

DeepSpeed's files are pickles, and it asks torch to trust them. Here torch reads them with its reader for tensors and
plain values instead, which refuses a file that could run code.
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
        """In place of what is not needed: directories are made with their files, and programs are not saved."""

    with (
        _replaced(engine.checkpoint_engine, save=write, makedirs=nothing),
        _replaced(engine, _copy_recovery_script=nothing),
    ):
        engine.save_checkpoint(directory, tag=TAG, save_latest=False, exclude_frozen_parameters=True)


def load_engine(engine: Engine, directory: Path) -> None:
    """Weights, optimizer and schedule as they were saved; frozen weights stay as they were loaded from the model.

    Raises:
        UserError: the directory holds no checkpoint of this model, or files that could run code.
    """
    try:
        with loading_data_only(directory):
            checkpoint_path, _ = engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=False)
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # DeepSpeed does not check what it reads
        raise UserError(
            f"{directory} cannot be loaded into this model ({type(error).__name__}: {reason_of(error)}): "
            "go on from another checkpoint, --resume PATH, or start anew, --resume never"
        ) from error
    if checkpoint_path is None:
        raise UserError(f"{directory} is no checkpoint of this model")


@contextlib.contextmanager
def loading_data_only(directory: Path) -> Iterator[None]:
    """Within the context torch loads tensors and plain values, though DeepSpeed asks it to trust the file.

    Raises:
        UserError: a file in `directory` holds anything else; the message names what it would call.
    """
    asked = os.environ.get(_DATA_ONLY)
    os.environ[_DATA_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(_known_classes()):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{directory} holds more than data{f' ({named[1]})' if named else ''}, which could run code: "
            "resume from another checkpoint"
        ) from error
    finally:
        del os.environ[_DATA_ONLY]
        if asked is not None:
            os.environ[_DATA_ONLY] = asked


def _known_classes() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The classes in DeepSpeed's files besides tensors and plain values; their objects hold data only, too."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextlib.contextmanager
def _replaced(holder: object, **attributes: object) -> Iterator[None]:
    """Within the context these attributes of `holder` hide those of its class."""
    vars(holder).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            delattr(holder, name)
