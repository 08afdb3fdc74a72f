"""Declares the options of step 2."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.parser import PathName, option
from common.config.shared import same_option
from common.errors import UserError
from common.supervised.config import ComparisonConfig, SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class RewardConfig(ComparisonConfig):
    """Step 2: reward model"""

    model_name_or_path: PathName = same_option(SupervisedConfig, "model_name_or_path", default="facebook/opt-350m")
    output_dir: PathName = same_option(SupervisedConfig, "output_dir", default="output/reward")
    learning_rate: float = same_option(SupervisedConfig, "learning_rate", default=5e-5)
    margin: float = option(0.0, "wanted distance of chosen and rejected score", unit="raw score", low=0)
    margin_column: str | None = option(
        None, "column of the data that holds each row's own margin, in place of --margin; its numbers are 0 or more"
    )
    centring_coef: float = option(0.0, "weight of the loss that keeps a pair's scores around 0", low=0)
    eval_iters: int = same_option(SupervisedConfig, "eval_iters", default=100)

    def validate(self) -> None:
        super().validate()
        if self.margin_column is not None and self.margin:
            raise UserError(f"--margin {self.margin:g} and --margin_column {self.margin_column}: give one of them")
