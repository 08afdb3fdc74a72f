"""Declares the options that say which data a step reads, and how its text becomes ids."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import ClassVar

from common.config.groups import RunOptions
from common.config.parser import Config, PathName, option
from common.data.blend import SourceSpec, parse_data_path
from common.data.errors import (
    BadRowsError,
    ColumnsError,
    DataFieldError,
    DeclaredColumnError,
    KeptColumnsError,
    MarginColumnError,
    NoEndTokenError,
    NothingToTrainOnError,
    NotUnicodeError,
    SeveralKeysError,
    SourceError,
    SplitByError,
    TemplateError,
    TooLongError,
    UnknownLayoutError,
)
from common.data.rows import FileFormat
from common.data.split import parse_data_split, parse_split_by
from common.data.templates import TEMPLATE_NAMES
from common.errors import DataError, InputError, UserError, named_by
from common.paths import NotWritable

# The options that errors of each class are about.
_FLAGS: dict[type[InputError], str] = {
    ColumnsError: "--columns",
    KeptColumnsError: "--keep_columns",
    DeclaredColumnError: "--reward",
    SplitByError: "--split_by",
    DataFieldError: "--data_field",
    MarginColumnError: "--margin_column",
    TemplateError: "--template",
    NotWritable: "--data_output_path",
}
# The options that help against errors of each class.
_ADVICE: dict[type[InputError], str] = {
    BadRowsError: "; mend them, or raise --max_bad_rows",
    UnknownLayoutError: "; name others with --columns",
    SeveralKeysError: ": say which are meant with --data_field NAME",
    NoEndTokenError: ": pass --add_eot_token (and --eot_token for its name)",
}


@dataclass(frozen=True, kw_only=True)
class DataOptions(Config):
    """Data"""

    phase: ClassVar[int]  # 0 SFT, 1 reward model, 2 PPO: which part of --data_split is this step's
    other_source_flag: ClassVar[str] = "--data_path"  # names the sources that are not in --data_path

    data_path: tuple[PathName, ...] = option(
        ("Dahoas/rm-static",),
        "builtin:*, files, directories or hub names; name:0.3 takes 30 percent of its prompts, "
        "name:1.3 all of them and 30 percent a second time",
    )
    data_split: str = option("2,4,4", "parts of the prompts for the steps 1, 2 and 3")
    eval_fraction: float = option(0.05, "share of the prompts held out for evaluation", low=0, below=1)
    split_by: str = option(
        "auto",
        "what keeps rows together in both: opening: the user's first turn; auto: the same, and as many more "
        "turns as it takes where over 1 percent of a source's dialogues begin alike; prompt: all of the user's turns; "
        "column:NAME: what a column of the data holds, such as the id of a conversation",
    )
    columns: dict[str, str] = option({}, "the data's own names of columns, as in prompt=question chosen=good")
    data_field: str | None = option(
        None, "key of the rows in JSON files that are one object; none: the only key that holds rows"
    )
    encoding: str | None = option(
        None, "encoding of text files that are not UTF-8, as in cp1252; none: UTF-8, or UTF-16 by its mark"
    )
    template: str = option("human_assistant", "the wording around questions and answers", choices=TEMPLATE_NAMES)
    template_date: str = option(
        "2025-01-01", "YYYY-MM-DD, what a chat template that writes the date writes, in all steps and whenever they run"
    )
    add_eot_token: bool = option(False, "end answers with --eot_token, not with the tokenizer's end token")
    eot_token: str = option("<|endoftext|>", "text of the end token that --add_eot_token adds")
    max_rows: int | None = option(None, "rows read from each source at most", low=1)
    max_bad_rows: float = option(0.02, "share of unusable rows above which the run stops", low=0, high=1)
    data_output_path: PathName = option(
        "output/data", "directory where prepared data is kept for the next run", affects="nothing"
    )

    def validate(self) -> None:
        super().validate()
        self.sources()
        unsplit = self.unsplit_sources()
        with named_by("--split_by"):
            parse_split_by(self.split_by)
        with named_by("--data_split"):
            shares = parse_data_split(self.data_split)
        if not shares[self.phase] and not unsplit:
            raise UserError(
                f"--data_split {self.data_split} leaves nothing for step {self.phase + 1}: "
                f"make part {self.phase + 1} greater than 0"
            )
        self.only_with("--add_eot_token", self.add_eot_token, "eot_token")
        try:
            date.fromisoformat(self.template_date)
        except ValueError:
            raise UserError(f"--template_date {self.template_date}: give a date as YYYY-MM-DD") from None

    def sources(self) -> list[SourceSpec]:
        """Those of `data_path`, which --data_split divides among the steps."""
        form = self.file_format()
        with named_by("--data_path"):
            return parse_data_path(self.data_path, form=form)

    def file_format(self) -> FileFormat:
        """The format of the files, from the options. Raises UserError for an unknown encoding."""
        with named_by("--encoding"):
            return FileFormat(self.data_field, self.encoding).checked()

    def all_sources(self) -> list[SourceSpec]:
        """Every data source that the step reads."""
        return self.sources() + self.unsplit_sources()

    def unsplit_sources(self) -> list[SourceSpec]:
        """Sources that are given to this step whole, whatever --data_split says."""
        return []

    def naming_flags(self, length_flag: str = "--max_seq_len") -> contextlib.AbstractContextManager[None]:
        """`naming_flags` for this step's sources."""
        shared = {spec.name for spec in self.sources()}
        return naming_flags(lambda source: "--data_path" if source in shared else self.other_source_flag, length_flag)


@dataclass(frozen=True, kw_only=True)
class ProgramConfig(DataOptions, RunOptions):
    """What every training program has"""


@contextlib.contextmanager
def naming_flags(
    source_flag: Callable[[str], str] = lambda source: "--data_path", length_flag: str = "--max_seq_len"
) -> Iterator[None]:
    """Within the context, an error of `common.data` becomes a `UserError` that names the option to change.

    Args:
        source_flag: the option that named a source.
        length_flag: the option that limits the length of rows.
    """
    try:
        yield
    except NotUnicodeError as error:
        advice = f"convert it, or say what it is, such as --encoding {error.examples}"
        raise UserError(f"{error}: {advice}") from error.__cause__
    except (TooLongError, NothingToTrainOnError) as error:
        flags = " and ".join(dict.fromkeys(map(source_flag, error.sources)))
        advice = (
            f" for {length_flag}: raise it"
            if isinstance(error, TooLongError)
            else ": see --data_split and --eval_fraction"
        )
        raise UserError(f"{flags} {error}{advice}") from error.__cause__
    except SourceError as error:
        raise UserError(f"{source_flag(error.source)} {error}") from error.__cause__
    except (DataError, TemplateError, NoEndTokenError, NotWritable) as error:
        flag = next((f"{flag} " for kind, flag in _FLAGS.items() if isinstance(error, kind)), "")
        advice = next((advice for kind, advice in _ADVICE.items() if isinstance(error, kind)), "")
        raise UserError(f"{flag}{error}{advice}") from error.__cause__
