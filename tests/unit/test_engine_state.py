"""Files of a checkpoint are read as data, whichever version of Python wrote them."""

from __future__ import annotations

import os

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from common.checkpoints.engine_state import loading_data_only
from common.checkpoints.errors import CheckpointError


class Pickled:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def written(tmp_path, item) -> str:
    torch.save({"zero_stage": item, "weights": torch.ones(2)}, tmp_path / "states.pt")
    return str(tmp_path / "states.pt")


@pytest.mark.parametrize(
    "stage",
    [
        ZeroStageEnum.weights,
        Pickled(ZeroStageEnum, 3),  # as Python 3.11.7 writes it, and
        Pickled(getattr, ZeroStageEnum, "weights"),  # 3.11.2
    ],
)
def test_a_stage_is_read_in_each_way_that_python_writes_it(stage, tmp_path):
    path = written(tmp_path, stage)
    with loading_data_only(tmp_path):
        assert torch.load(path, weights_only=False)["zero_stage"] is ZeroStageEnum.weights


@pytest.mark.parametrize(
    "item, named",
    [
        (Pickled(getattr, torch.nn.Module, "__init__"), "torch.nn"),
        (Pickled(getattr, torch.device, "__class__"), "builtins.getattr"),
        (Pickled(getattr, ZeroStageEnum, "__class__"), ""),
        (Pickled(os.mkdir, "canary"), "posix.mkdir"),
    ],
)
def test_anything_else_is_refused(item, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, item)
    with pytest.raises(CheckpointError, match=f"it holds more than data.*{named}"), loading_data_only(tmp_path):
        torch.load(path, weights_only=False)
    assert not (tmp_path / "canary").exists()
