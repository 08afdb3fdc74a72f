"""state.json of a checkpoint, and each rank's own tensors beside it: checked before anything is made of them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

STATE = "state.json"
_HOLDS = {
    "step": int,
    "optimizer_steps": int,
    "world_size": int,
    "state_dict": dict,
    "tracker": dict,
    "data": list,
    "config": dict,
    "batches": dict,
}
_TRACKER_HOLDS = {"step": int, "bytes": int, "seconds": (int, float)}
_MOST_RANKS = 100_000
RANDOM_STATE = "random.cpu"  # what every rank has


def rank_file(number: int) -> str:
    """The file of a rank's tensors."""
    return f"rank{number}.safetensors"


def read_state(path: Path) -> dict:
    """What state.json of a checkpoint holds.

    Raises:
        ValueError: it is no such file; the message says why.
    """
    try:
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_types(values, _HOLDS)
    _check_types(values["tracker"], _TRACKER_HOLDS)
    for name, value in values["batches"].items():
        _check_types({name: value}, {name: int})
    if not 1 <= values["world_size"] <= _MOST_RANKS:
        raise ValueError(f"world_size is {values['world_size']}")
    return values


def state_problems(path: Path) -> list[str]:
    """Why nothing can be made of a checkpoint's state; empty if there is no reason. Reads no tensor."""
    try:
        values = read_state(path)
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


def _check_types(values, holds: dict) -> None:
    if not isinstance(values, dict):
        raise ValueError("it is no object")
    for name, kind in holds.items():
        if name not in values:
            raise ValueError(f"it has no {name}")
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise ValueError(f"{name} is {str(values[name])[:40]!r}")
        if isinstance(values[name], (int, float)) and not 0 <= values[name] < 2**63:
            raise ValueError(f"{name} is {values[name]}")
