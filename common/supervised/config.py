"""Declares the options that every supervised program has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.config.groups import OneModelConfig, TrainedModelOptions, check_output_dir
from common.config.option import PathName, option
from common.config.shared import same_option
from common.data.options import ProgramConfig


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(ProgramConfig, OneModelConfig):
    """Model and result

    A program gives an option another default by `same_option(SupervisedConfig, NAME, default=...)`, which keeps the
    rest of its declaration.
    """

    model_name_or_path: PathName = option(
        "output/sft", "model to train: hub name, directory or builtin:*", names_model=True
    )
    output_dir: PathName = option("output/supervised", "directory of the result", affects="nothing")
    learning_rate: float = same_option(TrainedModelOptions, "learning_rate")
    eval_iters: int = option(0, "evaluation batches over all ranks at most; 0: all", low=0, affects="evaluation")

    def validate(self) -> None:
        super().validate()
        check_output_dir(self.output_dir, model_name_or_path=self.model_name_or_path)


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(SupervisedConfig):
    """Comparisons"""

    phase: ClassVar[int] = 1

    pairs_per_prompt: int | None = option(
        None, "comparisons made of one row with several answers at most; none: all", low=1
    )
