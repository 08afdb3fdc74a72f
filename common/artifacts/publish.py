"""Publishes the result of a run: writes the models, checks them, and writes their provenance last."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from common.artifacts.compatibility import text_of
from common.artifacts.provenance import FILE as PROVENANCE_FILE
from common.artifacts.provenance import Provenance
from common.artifacts.split_rule import openings_of, split_rule_of
from common.batching.collate import unmasked
from common.config.parser import save_config
from common.data.options import ProgramConfig
from common.data.prepare import PreparedData
from common.data.tokenization import Codec
from common.errors import DIVERGED, Diverged, TrainingFailure
from common.models.completeness import problem
from common.models.encoder_decoder import model_inputs
from common.models.engine import Engine
from common.runtime.distributed import barrier, device, is_main, on_every_rank, say
from common.runtime.heartbeat import set_phase
from common.training.engine import TrainedEngine

CONFIG_FILE = "run_config.yaml"
_IN_THE_WAY = (errno.EISDIR, errno.EEXIST, errno.ENOTDIR)  # errors that more disk space does not solve


@contextlib.contextmanager
def publishing(
    config: ProgramConfig,
    codec: Codec,
    engines: Mapping[str, TrainedEngine],
    step: str,
    base: str,
    data: PreparedData | None = None,
    parts: Sequence[str] = (),
    possible_parts: Sequence[str] = (),
    **further: Any,
) -> Iterator[None]:
    """Within the context, the caller exports the models. All ranks must enter it.

    provenance.json is deleted at the start and written at the end, after every model was checked. So an output
    directory with a provenance.json holds a complete result, even if the directory is used again. The resolved
    configuration is written too. Adapters of an earlier run, and parts that only that run had, are removed.

    Args:
        engines: the engines of the models to export, by the names that messages use.
        data: what the models were trained on.
        parts: model directories inside the output directory. Each gets the provenance too, so that it can be moved.
        possible_parts: all directories that the program writes models into, with other options too.
        further: more fields of the provenance.

    Raises:
        Diverged: the output of a model is not finite; nothing in the output directory has changed.
        TrainingFailure: a file cannot be written, or an exported model is incomplete.
    """
    set_phase("saving the result")
    for name, engine in engines.items():
        _check_usable(engine, name, codec)
        if engine.weight_changes.none():
            say(
                f"warning: training has left every weight of the {name} as it was: its learning rate is 0 or too small "
                "for --dtype, or every optimizer step was skipped, or no answer was left to learn from"
            )
    output = Path(config.output_dir)
    try:
        if is_main():
            (output / PROVENANCE_FILE).unlink(missing_ok=True)
            for leftover in ("adapter", *(part for part in possible_parts if part not in parts)):
                shutil.rmtree(output / leftover, ignore_errors=True)
        yield
        if is_main():
            for directory in [output / part for part in parts] or [output]:
                if fault := problem(directory, config.trust_remote_code):
                    raise TrainingFailure(
                        f"the result in {directory} is not whole: {fault}: run the same command "
                        "again, which goes on from the newest checkpoint"
                    )
            save_config(config, output / CONFIG_FILE)
            openings = openings_of(data) if data is not None else {}
            provenance = Provenance(
                step=step, base=base, shared_openings=openings, **split_rule_of(config), **text_of(codec), **further
            )
            for directory in (*(output / part for part in parts), output):
                provenance.write(directory)
    except (OSError, SafetensorError) as error:
        named = isinstance(error, OSError) and error.errno in _IN_THE_WAY
        cure = "move away what is there" if named else "free space there or make it writable"
        raise TrainingFailure(
            f"the result cannot be written to {output}: {error}: {cure}, and run the same command "
            "again, which goes on from the newest checkpoint"
        ) from error
    barrier()


@torch.no_grad()
def _check_usable(engine: Engine, name: str, codec: Codec) -> None:
    """Run one small forward pass: without held-out rows, no loss has been computed since the last update."""
    tokens = torch.full((1, 2), codec.end_id, device=device())
    one = torch.ones(1, dtype=torch.long, device=device())
    inputs, _ = model_inputs(engine, unmasked(tokens), one, one)
    engine.eval()
    output = engine(**inputs)
    engine.train()
    numbers = output if isinstance(output, torch.Tensor) else output.logits
    if not on_every_rank(bool(numbers.isfinite().all())):
        raise Diverged(f"what the trained {name} computes is not finite: {DIVERGED}")
