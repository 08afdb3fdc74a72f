"""Records in a provenance the rule that gives each step other prompts, and checks it in later steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.artifacts.provenance import Provenance, read_provenance
from common.config.parser import options
from common.data.blend import SourceSpec, parse_data_path
from common.data.keeping import KeptColumns
from common.data.openings import KeyRule
from common.data.options import DataOptions
from common.data.prepare import PreparedData
from common.data.request import DataRequest
from common.data.split import proportions
from common.errors import ModelError, UserError

_BY_OPENING = ("auto", "opening")


@dataclass(frozen=True)
class _Use:
    """How a step used a source: its part of `data_split`, or all rows where `data_split` is None."""

    data_split: str | None
    eval_fraction: float
    split_by: str

    def __str__(self) -> str:
        how = "whole (--sft_only_data_path)" if self.data_split is None else f"with --data_split {self.data_split}"
        by = "" if self.split_by in _BY_OPENING else f" and --split_by {self.split_by}"
        return f"{how} and --eval_fraction {self.eval_fraction:g}{by}"

    def agrees(self, other: _Use) -> bool:
        """Whether both are the same rule. `known_openings` compares the openings."""
        by = {"opening" if use.split_by in _BY_OPENING else use.split_by for use in (self, other)}
        if len(by) > 1 or self.eval_fraction != other.eval_fraction:
            return False
        if self.data_split is None or other.data_split is None:
            return self.data_split is other.data_split
        return proportions(self.data_split) == proportions(other.data_split)


def data_request(config: DataOptions, kind: str, max_tokens: int, keep: KeptColumns | None = None) -> DataRequest:
    """The request to prepare this step's part of `--data_path` as records of `kind`."""
    return DataRequest(
        data_path=config.sources(),
        kind=kind,
        phase=config.phase,
        data_split=config.data_split,
        eval_fraction=config.eval_fraction,
        split_by=config.split_by,
        shared=known_openings(config),
        columns=config.columns or None,
        max_tokens=max_tokens,
        max_rows=config.max_rows,
        max_bad_fraction=config.max_bad_rows,
        cache_dir=config.data_output_path,
        keep=keep,
    )


def split_rule_of(config: DataOptions) -> dict[str, Any]:
    """The fields of a provenance that record the data sources and the split rule."""
    return {
        "data_path": _places(parse_data_path(config.data_path)),
        "unsplit_data_path": _places(config.unsplit_sources()),
        "data_split": config.data_split,
        "eval_fraction": config.eval_fraction,
        "split_by": config.split_by,
    }


def openings_of(data: PreparedData) -> dict[str, list[int]]:
    """The field `shared_openings` of a provenance: by source, the openings that were keyed by more turns."""
    return {_place(source): openings for source, openings in data.report.read.shared.items()}


def key_rule(provenance: Provenance, source: str) -> KeyRule:
    """The rule by which the step that wrote the provenance would key the rows of a source."""
    openings = _openings(provenance, source)
    if openings is None:
        openings = set().union(*provenance.shared_openings.values())
    return KeyRule(provenance.split_by, frozenset(openings))


def known_openings(config: DataOptions) -> dict[str, list[int]]:
    """By source, the openings that earlier steps keyed by more turns. This step keys the same, even if data were added.

    Raises:
        UserError: the earlier steps differ from one another, or --split_by opening forbids to do the same.
    """
    if config.split_by not in _BY_OPENING:
        return {}
    openings_by_source = {}
    models = {
        f"--{name} {getattr(config, name)}": read_provenance(getattr(config, name))
        for name, meta in options(type(config)).items()
        if meta.names_model and getattr(config, name)
    }
    for name in dict.fromkeys(spec.name for spec in config.all_sources()):
        recorded = [
            (model, openings)
            for model, provenance in models.items()
            if provenance is not None and (openings := _openings(provenance, name)) is not None
        ]
        for model, openings in recorded:
            if openings != recorded[0][1]:
                raise UserError(
                    f"{recorded[0][0]} and {model} were trained on {name} split in two ways (it, --max_rows "
                    "or --split_by has changed in between), so prompts would be in two steps or on both "
                    "sides: train one of them again, or use other data"
                )
            if openings and config.split_by == "opening":
                raise UserError(
                    f"{model} was trained on {name} with --split_by auto, which split {len(openings)} of "
                    "its openings further; with --split_by opening prompts would be in two steps or on "
                    "both sides: use the same in every step, or other data"
                )
            openings_by_source[name] = sorted(openings)
    return openings_by_source


def _openings(provenance: Provenance, source: str) -> set[int] | None:
    """The openings keyed by more turns in a source or in one that overlaps with it; None if neither was trained on."""
    trained_on = [
        place
        for place in (*provenance.data_path, *provenance.unsplit_data_path)
        if _overlap(_place(source), _place(place))
    ]
    if trained_on and provenance.split_by == "opening":
        return set()
    recorded = [provenance.shared_openings[place] for place in trained_on if place in provenance.shared_openings]
    return set().union(*recorded) if recorded else None


def check_split_rule(provenance: Provenance, config: DataOptions, model: str) -> None:
    """Check that this run splits the data of an earlier step by the same rule.

    With another rule, a step could train or evaluate on prompts that another step has trained on.

    Args:
        model: directory of the model with this provenance.

    Raises:
        ModelError: this run would split a source that the model was trained on, or one that overlaps, by another rule.
    """
    now = _uses(**split_rule_of(config))
    before = _uses(
        provenance.data_path,
        provenance.unsplit_data_path,
        provenance.data_split,
        provenance.eval_fraction,
        provenance.split_by,
    )
    for source, use in now:
        for trained_on, used in before:
            if _overlap(source, _place(trained_on)) and not use.agrees(used):
                raise ModelError(
                    model,
                    f"it was trained on {trained_on} {used}; now {source} would be taken {use}, so prompts would be in "
                    "two steps or on both sides: use the same in every step, or other data",
                )


def _uses(
    data_path: Sequence[str], unsplit_data_path: Sequence[str], data_split: str, eval_fraction: float, split_by: str
) -> list[tuple[str, _Use]]:
    return [
        *((source, _Use(data_split, eval_fraction, split_by)) for source in data_path),
        *((source, _Use(None, eval_fraction, split_by)) for source in unsplit_data_path),
    ]


def _places(specs: Sequence[SourceSpec]) -> tuple[str, ...]:
    return tuple(_place(spec.name) for spec in specs)


def _place(source: str) -> str:
    """The resolved path of a file or directory; a hub name or builtin:* as it is."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else source


def _overlap(one: str, other: str) -> bool:
    """Whether two sources are the same, or one is a directory that contains the other."""
    paths = Path(one), Path(other)
    return (
        one == other
        or all(path.is_absolute() for path in paths)
        and (paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0]))
    )
