"""Computes the pairwise loss of a reward model, as a sum over pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from common.training.metrics import Sums, masked_sum


def bradley_terry_loss_sum(
    chosen: Tensor, rejected: Tensor, real: Tensor, *, margin: Tensor | float = 0.0, centring: float = 0.0
) -> tuple[Tensor, Sums]:
    """Sum over the real pairs of -log sigmoid(s_c - s_r - margin) + centring * (s_c + s_r)^2.

    The Bradley-Terry model as a loss: arXiv:2203.02155, eq. 1; the margin: arXiv:2307.09288, eq. 2; the centring:
    arXiv:2312.09244. The trainer divides the sum by the number of pairs in the whole optimizer step on all ranks.

    Args:
        chosen, rejected: (B,) raw scores s_c and s_r.
        real: (B,) bool; false for filler pairs, which add nothing.
        margin: a number, or (B,).
        centring: weight of the last term.

    Returns:
        The loss, a scalar, and the sums `pairs`, `loss`, `accuracy` (a tie counts a half), `chosen_score`,
        `rejected_score`, `margin` (s_c - s_r) and `squared_scores`.
    """
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    chosen, rejected = (score.to(dtype).masked_fill(~real, 0) for score in (chosen, rejected))
    gap = chosen - rejected
    loss = (-F.logsigmoid(gap - margin) + centring * (chosen + rejected).square()).masked_fill(~real, 0).sum()
    sums = {
        "pairs": real.sum(dtype=torch.float64),
        "loss": loss.detach().double(),
        "accuracy": masked_sum((gap.sign() + 1) / 2, real),
        "chosen_score": masked_sum(chosen, real),
        "rejected_score": masked_sum(rejected, real),
        "margin": masked_sum(gap, real),
        "squared_scores": masked_sum(chosen.double().square() + rejected.double().square(), real),
    }
    return loss, sums


def score_mean_and_std(sums: Sums) -> tuple[float, float]:
    """Mean and standard deviation of all scores, chosen and rejected, from merged sums."""
    scores = 2 * sums["pairs"].clamp_min(1)
    mean = (sums["chosen_score"] + sums["rejected_score"]) / scores
    variance = (sums["squared_scores"] / scores - mean.square()).clamp_min(0)
    return float(mean), float(variance.sqrt())
