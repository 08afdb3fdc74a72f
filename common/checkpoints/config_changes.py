"""Decides which options may differ between a run and its continuation; the options declare it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.config.groups import RunOptions
from common.config.parser import options
from common.errors import UserError
from common.runtime.distributed import say, world_size
from common.training.engine import read_override


def plain_config(config: RunOptions) -> dict[str, Any]:
    """The configuration as plain JSON values, without the options that have no effect."""
    values = {name: getattr(config, name) for name, meta in options(type(config)).items() if not meta.ignored}
    if values["deepspeed_config"]:
        values["deepspeed_config"] = read_override(values["deepspeed_config"])
    return json.loads(json.dumps(values))


def batches_of_all_ranks(config: RunOptions) -> dict[str, int]:
    """Rows of each batch of the configuration over all ranks, by `Batch.what`."""
    return {batch.what: batch.rows * world_size() for batch in config.batches()}


def config_of_result(config: RunOptions) -> dict[str, Any]:
    """The part of the configuration on which the result depends; batches are left out, see `batches_of_all_ranks`."""
    declared, flags = options(type(config)), _batch_flags(config)
    return {
        name: value
        for name, value in plain_config(config).items()
        if declared[name].affects != "nothing" and name not in flags
    }


def in_this_version(saved: Mapping[str, Any], config: RunOptions) -> dict[str, Any]:
    """A saved `plain_config`, perhaps of another version, with the options of this one: an option that it lacks has its
    default, and options that this version does not know are left out, see `unknown_options`."""
    defaults = {name: meta.default for name, meta in options(type(config)).items() if not meta.ignored}
    return {**json.loads(json.dumps(defaults)), **{name: saved[name] for name in defaults if name in saved}}


def unknown_options(saved: Mapping[str, Any], config: RunOptions, path: Path) -> list[str]:
    """A note if the configuration saved at `path` has options that this version does not know, otherwise nothing."""
    unknown = [f"--{name} {saved[name]}" for name in sorted(saved.keys() - options(type(config)).keys())]
    words = ", ".join(unknown)
    return [f"{path} was made with options that this version does not know and ignores: {words}"] if unknown else []


def changed_pieces(pieces: Mapping[str, str], saved: Mapping[str, str]) -> list[str]:
    """Which of a run's pieces have another name than they were saved with. One that was not saved is no change."""
    return [name for name in pieces if saved.get(name, pieces[name]) != pieces[name]]


def check_unchanged(
    config: RunOptions, data: Sequence[str], pieces: Mapping[str, str], values: Mapping[str, Any], path: Path
) -> None:
    """Raise UserError if another configuration, other pieces or other data made the checkpoint, and --resume_anyway is
    not given.

    Another version may have saved it, with other options: see `in_this_version`. A note names those that are ignored.

    Args:
        data: keys of the prepared data.
        pieces: see `Checkpoints`.
        values: state.json of the checkpoint.
        path: of the checkpoint.
    """
    if values["batches"].keys() != batches_of_all_ranks(config).keys():
        raise UserError(f"{path} is a checkpoint of another step: name one of this step, or --resume never")
    for note in unknown_options(values["config"], config, path):
        say(f"note: {note}")
    now, before = plain_config(config), in_this_version(values["config"], config)
    may_change = {name for name, meta in options(type(config)).items() if meta.may_change_on_resume}
    if values["world_size"] != world_size():
        _check_batches(config, values, path)
        may_change |= _batch_flags(config)
    changes = [
        f"--{name} was {before[name]!r}, now {now[name]!r}"
        for name in sorted(now)
        if name not in may_change and now[name] != before[name]
    ]
    made_with = values["pieces"]
    changes += [f"the {name} was {made_with[name]}, now {pieces[name]}" for name in changed_pieces(pieces, made_with)]
    if values["data"] != list(data) and not changes:
        changes = ["the data has other rows, or is prepared in another way"]
    if changes and not config.resume_anyway:
        raise UserError(
            f"{path} was made with another configuration: {'; '.join(changes)}: run the same command "
            "again, add --resume_anyway to go on with the new one, or --resume never to start anew"
        )


def count_of_ranks(ranks: int) -> str:
    """A number of ranks, for a message."""
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def _check_batches(config: RunOptions, values: Mapping[str, Any], path: Path) -> None:
    """The batch sizes of one rank may change with the number of ranks, those of all ranks together may not."""
    before, now = values["batches"], batches_of_all_ranks(config)
    changed = [batch for batch in config.batches() if now[batch.what] != before[batch.what]]
    if changed and not config.resume_anyway:
        had = " and ".join(f"{before[batch.what]} {batch.what}" for batch in changed)
        has = " and ".join(str(now[batch.what]) for batch in changed)
        flags = [batch.flags_for(before[batch.what], world_size()) for batch in changed]
        undivided = " and ".join(str(before[batch.what]) for batch, words in zip(changed, flags) if words is None)
        advice = f"a number of ranks that divides {undivided}" if undivided else " ".join(filter(None, flags))
        raise UserError(
            f"{path} was made by {count_of_ranks(values['world_size'])} with {had}, and this run of "
            f"{world_size()} has {has}: use {advice}, or --resume never to start anew"
        )


def _batch_flags(config: RunOptions) -> set[str]:
    return {flag for batch in config.batches() for flag in batch.flags}
