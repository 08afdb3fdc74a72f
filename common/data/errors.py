"""Defines a class for each kind of error in data, its options or its template.

The library says what is wrong with the thing. Which option of a program is concerned, and how to change it, is added in
one place by `common.data.options.naming_flags`.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import DataError, InputError

_SHOWN = 200  # characters of a source's name in a message


class SourceError(DataError):
    """A source that does not exist, holds no data or cannot be reached; `source` is its name as it was given."""

    def __init__(self, source: str, why: str):
        super().__init__(source[:_SHOWN], why)
        self.source = source


class ColumnsError(DataError):
    """A map of column names that does not fit the data."""


class KeptColumnsError(DataError):
    """A column to be kept that the data does not have; `subject` is its name."""


class DeclaredColumnError(DataError):
    """A column that the data does not have, though a reward needs it; `subject` is the name of the reward."""


class SplitByError(DataError):
    """A way of keeping rows together that there is not, or that does not fit the data."""


class MarginColumnError(DataError):
    """A column of margins that a source does not have."""


class DataFieldError(DataError):
    """A key of the rows that a JSON file does not have."""


class SeveralKeysError(DataError):
    """A JSON file of one object with rows under several keys."""


class UnknownLayoutError(DataError):
    """A file whose columns fit no layout."""


class NotUnicodeError(DataError):
    """A text file that is not UTF-8, where no other encoding was named.

    Args:
        examples: names of encodings that it may have.
    """

    def __init__(self, file: str, why: str, examples: str):
        super().__init__(file, why)
        self.examples = examples


class BadRowsError(DataError):
    """A source with more unusable rows than allowed."""

    def __init__(self, source: str, bad: int, total: int, allowed: float, examples: str):
        super().__init__(
            source,
            f"{bad} of {total} rows cannot be used, more than the allowed share of {allowed:g}{examples}",
        )


class NothingToTrainOnError(DataError):
    """Sources whose rows all went elsewhere: to other steps, or to evaluation.

    Args:
        sources: their names.
        other_steps, held_out: rows that belong to other steps, and rows to evaluate on.
        reasons: further explanations.
    """

    def __init__(self, sources: Sequence[str], other_steps: int, held_out: int, reasons: Sequence[str]):
        super().__init__(
            " and ".join(sources),
            f"no row is left to train on: {other_steps:,} belong to other steps and {held_out:,} are held out"
            + "".join(f"; {reason}" for reason in reasons),
        )
        self.sources = tuple(sources)


class TooLongError(DataError):
    """Sources of which no row fits into the longest sequence."""

    def __init__(self, sources: Sequence[str], too_long: int):
        super().__init__(" and ".join(sources), f"no row is left to train on: {too_long:,} are too long")
        self.sources = tuple(sources)


class TemplateError(InputError):
    """A template that does not exist, cannot be used with the tokenizer, or cannot write a record; `subject` is its
    name."""


class NoEndTokenError(InputError):
    """A tokenizer without a token that ends a response; `subject` is the name it was loaded by."""
