"""A ZeRO checkpoint for another number of ranks, through DeepSpeed's universal checkpoints.

What ZeRO has cut into shards is put together, parameter by parameter, only for the moment of loading; every rank then
takes its share.
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from common.checkpoints.engine_state import TAG, loading_data_only
from common.errors import TrainingFailure
from common.runtime.distributed import gather_objects, rank, world_size


def make_universal(source: Path, target: Path, names: Sequence[str]) -> None:
    """Convert the checkpoints of the engines `names` in `source`, divided between the ranks, which all must call it.

    Args:
        target: gets NAME/TAG for each; needs room for about twice what the shards take.

    Raises:
        TrainingFailure: the disk refused, on whatever rank.
    """
    failure = None
    try:
        for name in names[rank() :: world_size()]:
            _convert(source / name / TAG, target / name)
    except (OSError, RuntimeError) as error:  # RuntimeError: of torch's own writer, where the disk is full
        failure = str(error)
    for reported in filter(None, gather_objects(failure)):
        raise TrainingFailure(
            f"{source} could not be put together for {world_size()} ranks in {target}: {reported}: "
            "free space there, or start as many ranks as made it"
        )


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    options = Namespace(
        input_folder=str(source.absolute()),
        output_folder=TAG,
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # The converter takes the path it writes to for a regular expression: a relative one has nothing special in it.
    with (
        loading_data_only(source),
        contextlib.chdir(target),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        ds_to_universal.main(options)


@contextlib.contextmanager
def loading_universal(engine):
    """Within the context `engine`, at ZeRO 1-3, loads a universal checkpoint.

    DeepSpeed leaves some of AdamW's state wrong at stage 3: all groups get rate and decay of the first, and count
    their steps in one tensor, each on top of the others. Afterwards every group has its own again.
    """
    adamw = engine.optimizer.optimizer
    settings = [{name: value for name, value in group.items() if name != "params"} for group in adamw.param_groups]
    engine.load_universal_checkpoint = lambda: True  # as "checkpoint": {"load_universal": true} has it
    try:
        yield
    finally:
        del engine.load_universal_checkpoint
    for group, kept, rate in zip(adamw.param_groups, settings, engine.lr_scheduler.get_last_lr(), strict=True):
        group.update(kept, lr=rate)
    for parameter, state in adamw.state.items():
        if isinstance(state["step"], torch.Tensor):
            place = parameter.device if adamw.defaults.get("fused") else "cpu"
            state["step"] = state["step"].to(place, copy=True)
