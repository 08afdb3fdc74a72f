"""Loads a checkpoint that another number of ranks saved, through DeepSpeed's universal checkpoints.

ZeRO had partitioned every parameter. The parts are joined in temporary files, and every rank loads its new part from
them. State that is not partitioned is loaded directly.
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from common.checkpoints.config_changes import count_of_ranks
from common.checkpoints.engine_state import TAG, load_engine, loading_data_only
from common.checkpoints.loading import naming_checkpoint
from common.checkpoints.state import rank_file
from common.checkpoints.store import CheckpointStore
from common.checkpoints.training_state import TrainingState
from common.errors import TrainingFailure
from common.models.engine import Engine
from common.runtime.distributed import barrier, gather_objects, rank, say, seed_rank, world_size


def load_resharded(
    path: Path, state: TrainingState, values: Mapping[str, Any], store: CheckpointStore, seed: int
) -> None:
    """Load the checkpoint at `path` into the engines and tensors of `state`. All ranks must call it.

    Args:
        values: state.json of the checkpoint.
        store: provides a temporary directory for the joined parameters.
        seed: of the run. Each rank is seeded from it again, because the saved random states belong to other ranks.

    Raises:
        TrainingFailure: the joined parameters could not be written.
        CheckpointError: the checkpoint is not one of this run's models.
    """
    sharded = [name for name, engine in state.engines.items() if engine.zero_optimization()]
    unsharded = store.scratch()
    make_universal(path, unsharded, sharded)
    for name, engine in state.engines.items():
        if name in sharded:
            with loading_universal(engine):
                load_engine(engine, unsharded / name)
        else:
            load_engine(engine, path / name)
    barrier()  # every rank has read
    store.clean()
    files = [safe_open(path / rank_file(number), "pt") for number in range(values["world_size"])]
    with naming_checkpoint(path):
        state.reshape(lambda name: [file.get_tensor(f"state.{name}") for file in files])
    seed_rank(seed + values["step"] * world_size())
    say(
        f"note: {path} was made by {count_of_ranks(values['world_size'])}, and this run has {world_size()}: the same "
        "batches follow, and numbers that agree but for rounding; dropout, if there is any, is drawn anew"
    )


def make_universal(source: Path, target: Path, names: Sequence[str]) -> None:
    """Convert the checkpoints of the engines `names` in `source`. The ranks, which all must call it, divide the work.

    Args:
        target: gets NAME/TAG for each engine; needs about twice the bytes of the shards.

    Raises:
        TrainingFailure: a file could not be written, on any rank.
    """
    failure = None
    try:
        for name in names[rank() :: world_size()]:
            _convert(source / name / TAG, target / name)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError where the disk is full
        failure = str(error)
    for reported in filter(None, gather_objects(failure)):
        raise TrainingFailure(
            f"{source} could not be put together for {world_size()} ranks in {target}: {reported}: "
            "free space there, or start as many ranks as made it"
        )


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    settings = Namespace(
        input_folder=str(source.absolute()),
        output_folder=TAG,
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # The converter uses the path that it writes to as a regular expression: a relative one has no special characters.
    with (
        loading_data_only(source),
        contextlib.chdir(target),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        ds_to_universal.main(settings)


@contextlib.contextmanager
def loading_universal(engine: Engine) -> Iterator[None]:
    """Within the context, `engine` (at ZeRO 1-3) loads a universal checkpoint.

    At stage 3 DeepSpeed loads some of AdamW's state wrongly: all groups get the learning rate and weight decay of the
    first group, and all share one tensor as step counter, so that each group's step is counted again by the others.
    When the context ends, every group has its own values and counter again.
    """
    adamw = engine.optimizer.optimizer
    settings = [{name: value for name, value in group.items() if name != "params"} for group in adamw.param_groups]
    engine.load_universal_checkpoint = lambda: True  # as "checkpoint": {"load_universal": true} has it
    try:
        yield
    finally:
        del engine.load_universal_checkpoint
    for group, own_settings, rate in zip(adamw.param_groups, settings, engine.lr_scheduler.get_last_lr(), strict=True):
        group.update(own_settings, lr=rate)
    for parameter, state in adamw.state.items():
        if isinstance(state["step"], torch.Tensor):
            # A fused optimizer has its step counter on the parameter's device, any other on the CPU.
            target = parameter.device if adamw.defaults.get("fused") else "cpu"
            state["step"] = state["step"].to(target, copy=True)
