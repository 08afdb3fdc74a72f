"""Defines groups of options that the inference programs share."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from common.config.parser import Config, ConfigType, PathName, option, parse
from common.data.rows import FileFormat
from common.data.templates import TEMPLATE_NAMES
from common.errors import UserError, named_by

MODEL = "the model: a directory, the output of step 1 or 3, an adapter or a hub name"


@dataclass(frozen=True, kw_only=True)
class SourceOptions(Config):
    """Source"""

    trust_remote_code: bool = option(False, "allow models to bring and run their own Python code")
    data_output_path: PathName = option("output/data", "directory where built-in and merged models are kept")


@dataclass(frozen=True, kw_only=True)
class LoadOptions(SourceOptions):
    """Loading"""

    merge_adapter: bool = option(False, "lay an adapter that lies beside a whole model over it")
    template: str = option(
        "auto",
        "the wording around questions and answers; auto: the one the model was trained with, else the "
        "tokenizer's chat template",
        choices=("auto", *TEMPLATE_NAMES),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes a GPU if there is one")
    dtype: str = option(
        "auto",
        "number format of the weights; auto is bf16 on a GPU, fp32 on a CPU",
        choices=("auto", "bf16", "fp16", "fp32"),
    )

    def validate(self) -> None:
        super().validate()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"--device {self.device}: expected auto, cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(Config):
    """Decoding"""

    max_new_tokens: int = option(256, "longest answer", unit="tokens", low=1)
    temperature: float = option(0.0, "0 takes the most probable token, 1 samples as in training", low=0)
    top_p: float = option(1.0, "sample from the fewest tokens that are so probable together", above=0, high=1)
    top_k: int = option(0, "sample from this many tokens; 0: from all", low=0)
    num_beams: int = option(1, "beams of a beam search; 1: none", low=1)
    repetition_penalty: float = option(1.0, "above 1 makes the answer's own tokens less probable", above=0)
    no_repeat_ngram_size: int = option(
        0,
        "an answer never repeats so many tokens in a row; 5 helps small models that go round in circles; 0: no limit",
        unit="tokens",
        low=0,
    )
    seed: int = option(1234, "seed of sampling", low=0, high=2**32 - 1)

    def validate(self) -> None:
        super().validate()
        self.only_with("--temperature above 0", self.temperature > 0, "top_p", "top_k")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(Config):
    """Prompts"""

    data_path: tuple[PathName, ...] = option((), "the prompts: builtin:*, files, directories or hub names")
    columns: dict[str, str] = option({}, "the data's own names of columns, as in prompt=question")
    data_field: str | None = option(
        None, "key of the rows in JSON files that are one object; none: the only key that holds rows"
    )
    encoding: str | None = option(
        None, "encoding of text files that are not UTF-8, as in cp1252; none: UTF-8, or UTF-16 by its mark"
    )
    max_prompts: int | None = option(None, "prompts answered at most", low=1)
    max_rows: int | None = option(None, "rows read from each source at most", low=1)
    max_bad_rows: float = option(0.02, "share of unusable rows above which the run stops", low=0, high=1)
    batch_size: int = option(16, "prompts answered together", low=1)

    def validate(self) -> None:
        super().validate()
        self.file_format()

    def file_format(self) -> FileFormat:
        """The format of the data files, from the options. Raises UserError for an unknown encoding."""
        with named_by("--encoding"):
            return FileFormat(self.data_field, self.encoding).checked()


def read_options(cls: type[ConfigType], argv: Sequence[str] | None) -> ConfigType:
    """The options of a command line. Notes go to standard error, because standard output is for responses."""
    config = parse(cls, argv)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    return config
