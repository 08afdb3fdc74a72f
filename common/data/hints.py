"""Gives advice that names an option of the programs, for messages and log lines about rows and files.

The rest of this package raises errors without any option's name (see `common.data.errors`). The texts here are part of
a longer message that is made where a file is read, far from the options.
"""

from __future__ import annotations

NAME_COLUMNS = "name others with --columns"
USE_COLUMN = "--columns gives a column a meaning, as in --columns context=NAME, which puts it behind the question"
CHOOSE_FIELD = "say which are meant with --data_field NAME"
LOOKS_WESTERN = "it looks like Windows-1252: convert it, or --encoding cp1252"
NAME_ENCODING = "convert it, or say what it is, such as --encoding cp1251, gb18030, big5, shift_jis or euc_kr"
SPLIT_BY = "by which to split (--split_by)"
HOLD_OUT_MORE = "raise --eval_fraction or give more data"
TEXT_HAS_TEMPLATE = (
    "and --template wraps the text again: give it without them, or --template none if it is ready as it is"
)


def keep_together(apart_by: str) -> str:
    """What to do about rows that no split separates; `apart_by`: values of --split_by that may."""
    return (
        "give them to one step with --data_split (such as 1,0,0) and --eval_fraction 0, or tell them apart with "
        f"--split_by {apart_by}"
    )
