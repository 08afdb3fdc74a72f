"""Declares the options that every supervised program has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.config.groups import OneModelConfig
from common.config.option import PathName
from common.data.options import ProgramConfig


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(ProgramConfig, OneModelConfig):
    """Base of the configuration of a supervised program, which declares the options below with its own defaults."""

    if TYPE_CHECKING:
        model_name_or_path: PathName
        eval_iters: int
