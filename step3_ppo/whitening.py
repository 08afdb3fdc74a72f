"""Normalises advantages to mean 0 and variance 1."""

from __future__ import annotations

from torch import Tensor

from common.training.metrics import masked_sum


def whiten(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8) over the response tokens; 0 outside the mask.

    advantages (B, R), the whole experience and not a rank's share of it; response_mask (B, R) bool. The variance
    is the mean square of the deviations, and is taken after the mean so that it loses no digits.
    """
    count = response_mask.sum().clamp_min(1)
    deviations = advantages.double() - masked_sum(advantages, response_mask) / count
    variance = masked_sum(deviations.square(), response_mask) / count
    whitened = deviations / (variance + 1e-8).sqrt()
    return whitened.masked_fill(~response_mask, 0).to(advantages.dtype)
