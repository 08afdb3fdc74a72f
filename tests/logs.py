"""What a run has logged and saved, read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def metrics(directory: Path) -> list[dict]:
    """The rows of logs/metrics.jsonl in a run's output directory, without times and what is computed from them."""
    lines = (directory / "logs" / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if "seconds" not in name and name != "samples_per_second"
        }
        for line in lines
    ]


def same_weights(whole: Path, resumed: Path) -> None:
    """Asserts that two runs have left the same models, bit for bit."""
    models = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert models and models == sorted(path.relative_to(resumed) for path in resumed.rglob("*.safetensors"))
    for model in models:
        expected, found = load_file(whole / model), load_file(resumed / model)
        assert all(torch.equal(found[name], expected[name]) for name in expected), model


def assert_tensorboard_shows(rows: list[dict], directory: Path) -> None:
    """The events in a directory are the scalars of the rows of metrics.jsonl, and nothing else."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(directory)).Reload()
    shown = {(tag, event.step): event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}
    logged = {
        (f"{row['phase']}/{name}", row["step"]): value
        for row in rows
        for name, value in row.items()
        if name not in ("phase", "step", "seconds") and value is not None
    }
    assert logged and shown == pytest.approx(logged, rel=1e-6)  # events hold single precision


class NoLog:
    """Metrics that are written nowhere."""

    def begin(self, place=None) -> None:
        pass

    def place(self, step: int) -> dict[str, float]:
        return {"step": step, "bytes": 0, "seconds": 0.0}

    def lost(self) -> None:
        return None
