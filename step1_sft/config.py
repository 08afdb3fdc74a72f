"""Declares the options of step 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.config.parser import PathName, option
from common.config.shared import same_option
from common.data.blend import SourceSpec, parse_data_path
from common.data.stream_options import StreamOptions
from common.errors import UserError, named_by
from common.supervised.config import SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig, StreamOptions):
    """Step 1: supervised fine-tuning"""

    phase: ClassVar[int] = 0
    other_source_flag: ClassVar[str] = "--sft_only_data_path"

    model_name_or_path: PathName = same_option(SupervisedConfig, "model_name_or_path", default="facebook/opt-1.3b")
    output_dir: PathName = same_option(SupervisedConfig, "output_dir", default="output/sft")
    # The rate of DeepSpeed-Chat's published OPT-1.3B script for several GPUs.
    learning_rate: float = same_option(SupervisedConfig, "learning_rate", default=9.65e-6)
    sft_only_data_path: tuple[PathName, ...] = option((), "further data sources, given to this step whole")
    train_on_prompt: bool = option(False, "train on the tokens of prompts too")
    packing: bool = option(
        False,
        "let whole rows share sequences of --max_seq_len tokens, each blind to the others: the same steps, loss "
        "and gradients from fewer, fuller micro-batches; a model that cannot gets micro-batches of rows of similar "
        "length",
    )
    eval_max_seq_len: int | None = option(
        None,
        "longest prompt and answer together in an evaluation, which leaves longer rows out; with --packing the others "
        "share sequences of so many tokens; none: --max_seq_len, a sequence for each row",
        unit="tokens",
        low=2,
        affects="evaluation",
    )
    eval_iters: int = same_option(SupervisedConfig, "eval_iters")

    def validate(self) -> None:
        super().validate()
        if self.eval_max_seq_len is not None and self.eval_max_seq_len > self.max_seq_len:
            raise UserError(
                f"--eval_max_seq_len {self.eval_max_seq_len} is above --max_seq_len {self.max_seq_len}: none is longer"
            )

    def unsplit_sources(self) -> list[SourceSpec]:
        if not self.sft_only_data_path:
            return []
        form = self.file_format()
        with named_by("--sft_only_data_path"):
            return parse_data_path(self.sft_only_data_path, form=form)
