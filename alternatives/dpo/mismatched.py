"""Gives each row of feedback a mismatched response: a response to another prompt, by which KTO estimates its KL.

Which one depends on the prepared rows alone: not on the batch, the rank, the seed or the epoch. So the reference's
log-probabilities of these responses are computed once, and a step's estimate depends on nothing but its rows.
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute
from datasets import Dataset

from common.errors import DataError

_CHUNK = 10_000  # rows whose lengths are read at once


def mismatched_rows(dialogues: np.ndarray) -> np.ndarray:
    """(N,) int64: for each row another one, of another dialogue.

    Rows are ordered by their dialogue, which is a hash, so at random. The row k of a dialogue is given the row k behind
    it, cyclically. Where all dialogues have equally many rows, each row is so given to exactly one other.

    Args:
        dialogues: (N,) int64, of at least two dialogues; see `common.data.openings.SplitKey`.
    """
    rows = len(dialogues)
    order = np.argsort(dialogues, kind="stable")
    _, starts, counts = np.unique(dialogues[order], return_index=True, return_counts=True)
    start, count = np.repeat(starts, counts), np.repeat(counts, counts)
    place = np.arange(rows) - start
    partners = np.empty(rows, np.int64)
    partners[order] = order[(start + count + place % (rows - count)) % rows]
    return partners


def with_mismatched(rows: Dataset, max_tokens: int, what: str) -> Dataset:
    """The rows with a column `mismatched`, the number of the row whose response is taken, and with a `length` that has
    room for this too. It is cut where it would make the sequence longer than `max_tokens`.

    Args:
        what: a name of the rows, for the error.

    Raises:
        DataError: all rows are of one dialogue.
    """
    if not len(rows):
        return rows
    columns = rows.select_columns(["prompt_ids", "response_ids", "dialogue"]).with_format("arrow")
    chunks = [
        (
            pyarrow.compute.list_value_length(chunk["prompt_ids"]).to_numpy(),
            pyarrow.compute.list_value_length(chunk["response_ids"]).to_numpy(),
            chunk["dialogue"].to_numpy(),
        )
        for chunk in columns.iter(_CHUNK)
    ]
    prompts, responses, dialogues = (np.concatenate(column) for column in zip(*chunks))
    if (dialogues == dialogues[0]).all():
        raise DataError(what, "they are of one dialogue, and each needs a response to another prompt: give more data")
    partners = mismatched_rows(dialogues)
    lengths = prompts + np.maximum(responses, np.minimum(responses[partners], max_tokens - prompts))
    return rows.remove_columns("length").add_column("length", lengths).add_column("mismatched", partners)
