"""Scores of whole sequences: the number at the last real token."""

from __future__ import annotations

import torch


def score_at_last_token(numbers: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Pool per-position numbers to one score per sequence.

    Args:
        numbers: (B, L) from `ScalarModel`, right-padded rows.
        lengths: (B,) real tokens per row, at least 1.

    Returns:
        (B,) the number at position lengths - 1.
    """
    return numbers.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)
