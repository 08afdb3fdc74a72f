"""Declares the options by which a step reads its training data as a stream."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.groups import SupervisedOptions
from common.config.parser import option, options
from common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StreamOptions(SupervisedOptions):
    """Streaming"""

    stream: bool = option(
        False,
        "read the training data row by row while training, several sources side by side, in place of preparing all of "
        "it first: the run starts at once and stores nothing of it; how many rows there are is not known, so "
        "--max_steps says how long the run is, and rows are shuffled within --shuffle_buffer",
    )
    max_steps: int = option(
        0,
        "with --stream, the steps of the run and of its learning rate, over as many passes as they take",
        unit="optimizer steps",
        low=0,
    )
    shuffle_buffer: int = option(
        10_000, "with --stream, rows that are read and shuffled together; the more, the better mixed", low=1
    )
    stream_sample: int = option(
        10_000,
        "with --stream, the first rows of each source that are looked through before training: the held-out ones among "
        "them are those that are evaluated, besides the sources' own test data",
        low=1,
    )

    def validate(self) -> None:
        super().validate()
        self.only_with("--stream", self.stream, "max_steps", "shuffle_buffer", "stream_sample")
        if not self.stream:
            return
        if not self.max_steps:
            raise UserError(
                "--stream needs --max_steps N: how many rows a stream has is not known before its end; the steps of E "
                "passes are E times the rows, over the rows of an optimizer step"
            )
        if self.num_train_epochs != options(type(self))["num_train_epochs"].default:
            raise UserError("--num_train_epochs has no meaning with --stream: --max_steps says how long the run is")
        if self.group_by_length:
            raise UserError("--group_by_length needs all rows at once, and --stream has those of one step: keep one")
