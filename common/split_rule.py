"""The rule that keeps the steps' prompts apart, as a provenance records it and as the next step checks it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.data.blend import SourceSpec, parse_data_path
from common.data.split import proportions
from common.errors import UserError
from common.options import DataOptions
from common.provenance import Provenance


@dataclass(frozen=True)
class _Use:
    """How a step took a source: its part of a split, or, where that is None, the whole."""

    data_split: str | None
    eval_fraction: float

    def __str__(self) -> str:
        how = "whole (--sft_only_data_path)" if self.data_split is None else f"with --data_split {self.data_split}"
        return f"{how} and --eval_fraction {self.eval_fraction:g}"

    def agrees(self, other: _Use) -> bool:
        if self.eval_fraction != other.eval_fraction or None in (self.data_split, other.data_split):
            return self == other
        return proportions(self.data_split) == proportions(other.data_split)


def split_rule_of(config: DataOptions) -> dict[str, tuple[str, ...] | str | float]:
    """The part of a provenance that says which data was taken, and by which rule."""
    return {"data_path": _places(parse_data_path(config.data_path)),
            "unsplit_data_path": _places(config.unsplit_sources()),
            "data_split": config.data_split, "eval_fraction": config.eval_fraction}


def check_split_rule(provenance: Provenance, config: DataOptions, made: str) -> None:
    """Two rules for the same data would let a step train on, or evaluate on, what another has trained on.

    Args:
        made: names the model of this provenance, for the message.

    Raises:
        UserError: this run takes a source, or a part of one, by another rule than the model was trained under.
    """
    now = _uses(**split_rule_of(config))
    before = _uses(provenance.data_path, provenance.unsplit_data_path, provenance.data_split, provenance.eval_fraction)
    for source, use in now:
        for trained_on, used in before:
            if _overlap(source, _place(trained_on)) and not use.agrees(used):
                raise UserError(f"{made} was trained on {trained_on} {used}; now {source} would be taken {use}, so "
                                "prompts would be in two steps or on both sides: use the same in every step, or "
                                "other data")


def _uses(data_path: Sequence[str], unsplit_data_path: Sequence[str], data_split: str,
          eval_fraction: float) -> list[tuple[str, _Use]]:
    return [*((source, _Use(data_split, eval_fraction)) for source in data_path),
            *((source, _Use(None, eval_fraction)) for source in unsplit_data_path)]


def _places(specs: Sequence[SourceSpec]) -> tuple[str, ...]:
    return tuple(_place(spec.name) for spec in specs)


def _place(source: str) -> str:
    """A file or directory by the one path that all its spellings lead to; a hub name or builtin:* as it is."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else source


def _overlap(one: str, other: str) -> bool:
    """Whether two sources are the same or one of them lies in the other, a directory."""
    paths = Path(one), Path(other)
    return one == other or all(path.is_absolute() for path in paths) and (
        paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0]))
