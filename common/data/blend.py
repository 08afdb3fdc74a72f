"""Parses a blend of several data sources, each with a weight: `a b:0.3`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from common.data.rows import FileFormat
from common.data.split import fractions
from common.errors import DataError

_WEIGHTED = re.compile(r"(?P<name>.*):(?P<weight>[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|[+-]?inf|nan)", re.I | re.S)


@dataclass(frozen=True)
class SourceSpec:
    """One source of a blend.

    Attributes:
        name: `builtin:NAME`, a path or a hub name.
        weight: the share of its prompts that is kept; 2.0 takes every row twice.
        config_name: the configuration of a hub data set that has several.
        form: what its files do not show by their content.
        streamed: it is read as it is needed: of a hub data set nothing is stored, of files not every byte is hashed.
    """

    name: str
    weight: float = 1.0
    config_name: str | None = None
    form: FileFormat = FileFormat()
    streamed: bool = False

    def copies(self, split_key: str) -> int:
        """How often the rows of the dialogue with this split key (`openings.SplitKey.text`) are taken.

        A hash of the key decides about the fractional part of the weight. So all rows of a dialogue are kept or dropped
        together, and a greater weight keeps everything that a smaller one keeps.
        """
        always = math.floor(self.weight)
        (position,) = fractions(split_key, "blend", 1)
        return always + (position < self.weight - always)


def parse_data_path(
    values: Sequence[str], *, config_name: str | None = None, form: FileFormat = FileFormat()
) -> list[SourceSpec]:
    """`['a', 'b:0.3', 'builtin:courtesy']` -> sources with weights 1, 0.3 and 1.

    Only a trailing `:number` is a weight, and only if there is no path of the whole name: half of a folder `snap:2`
    is `snap:2:0.5`. Raises DataError for no source, an empty name, a weight that is not a positive number, or
    several sources in one value.
    """
    if not values:
        raise DataError(
            "an empty list", "name at least one data source (builtin:..., a file, a directory or a hub data set)"
        )
    specs = []
    for value in values:
        match = None if os.path.exists(value) else _WEIGHTED.fullmatch(value)
        name, weight = (match["name"], float(match["weight"])) if match else (value, 1.0)
        if not name.strip():
            raise DataError(repr(value), "there is no name; write NAME or NAME:WEIGHT")
        several = [part for part in re.split(r"[,;\s]+", value) if part]
        if len(several) > 1 and not os.path.exists(name):
            raise DataError(
                repr(value),
                f"there is no such path; write several sources as words of their own, {' '.join(several)}, and in a "
                f"recipe as a list, [{', '.join(several)}]",
            )
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(repr(value), "the weight must be a number above zero")
        specs.append(SourceSpec(name, weight, config_name, form))
    return specs
