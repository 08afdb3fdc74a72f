"""Reads and checks state.json of a checkpoint, and the files with each rank's own tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.checkpoints.errors import CheckpointError
from common.formats import other_format

STATE = "state.json"
FORMAT = 1  # of state.json and of the files beside it; raised when older versions could not read them any more
RANDOM_STATE = "random.cpu"  # a tensor that the file of every rank has
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "optimizer_steps": int,
    "world_size": int,
    "state_dict": dict,
    "tracker": dict,
    "data": list,
    "config": dict,
    "batches": dict,
    "pieces": dict,
}
_TRACKER_FIELDS: dict[str, type | tuple[type, ...]] = {"step": int, "bytes": int, "seconds": (int, float)}
_MAX_RANKS = 100_000


def rank_file(number: int) -> str:
    """The name of the file of a rank's tensors."""
    return f"rank{number}.safetensors"


def read_state(path: Path) -> dict[str, Any]:
    """The content of state.json of the checkpoint at `path`; fields that this version does not know stay in it.

    Raises:
        ValueError: the file has other content; the message says what is wrong with it.
        CheckpointError: the checkpoint has another format than that of this version.
    """
    try:
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(values, dict):
        raise ValueError("it is no object")
    if other := other_format(values, FORMAT):
        raise CheckpointError(path, other, cure="use the version that made it")
    values.setdefault("pieces", {})  # earlier files have none
    _check_types(values, _FIELDS)
    _check_types(values["tracker"], _TRACKER_FIELDS)
    for name, value in values["batches"].items():
        _check_types({name: value}, {name: int})
    for name, value in values["pieces"].items():
        _check_types({name: value}, {name: str})
    if not 1 <= values["world_size"] <= _MAX_RANKS:
        raise ValueError(f"world_size is {values['world_size']}")
    return values


def state_problems(path: Path) -> list[str]:
    """What is wrong with state.json and the ranks' files of a checkpoint; empty if they are good. Reads no tensor.

    Another format does not count as damage: a run must not skip such a checkpoint, but end when `read_state` raises.
    """
    try:
        values = read_state(path)
    except CheckpointError:
        return []
    except (OSError, ValueError) as error:
        return [f"{STATE} cannot be used: {getattr(error, 'strerror', None) or error}"]
    for number in range(values["world_size"]):
        try:
            with safe_open(path / rank_file(number), "pt") as file:
                if RANDOM_STATE not in file.keys():
                    return [f"{rank_file(number)} has no {RANDOM_STATE}"]
        except (OSError, SafetensorError) as error:
            return [f"{rank_file(number)} cannot be used: {getattr(error, 'strerror', None) or error}"]
    return []


def _check_types(values: Any, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    if not isinstance(values, dict):
        raise ValueError("it is no object")
    for name, kind in fields.items():
        if name not in values:
            raise ValueError(f"it has no {name}")
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise ValueError(f"{name} is {str(values[name])[:40]!r}")
        if isinstance(values[name], (int, float)) and not 0 <= values[name] < 2**63:
            raise ValueError(f"{name} is {values[name]}")
