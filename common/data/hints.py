"""Gives advice that names an option of the programs, for notes about rows.

Errors name no option (see `common.data.errors`). But notes are printed, and kept with the prepared data, where
rows are counted: no program adds anything to them.
"""

from __future__ import annotations

USE_COLUMN = "--columns gives a column a meaning, as in --columns context=NAME, which puts it behind the question"
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
