"""Computes the loss of Kahneman-Tversky optimisation, as a sum over responses that are each marked good or bad."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alternatives.dpo.loss import Responses, log_ratio
from common.training.metrics import Metrics, Sums, masked_sum, means


@dataclass(frozen=True)
class KTOOptions:
    """The numbers that the loss reads.

    Attributes:
        beta: scale of the implicit reward.
        desirable_weight, undesirable_weight: lambda_D and lambda_U, weights of good and of bad responses.
    """

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def kl_baseline(log_ratios: Tensor, rows: Tensor) -> Tensor:
    """The reference point z_0 = max(0, mean of log(pi(y') / pi_ref(y'))) over mismatched responses y', in nats:
    arXiv:2402.01306, section 4.

    Args:
        log_ratios: a scalar, the sum over all rows.
        rows: a scalar, how many these are.
    """
    return (log_ratios / rows.clamp_min(1)).clamp_min(0)


def kto_loss_sum(
    responses: Responses, desirable: Tensor, real: Tensor, baseline: Tensor, options: KTOOptions
) -> tuple[Tensor, Sums]:
    """Sum over the real rows of lambda_D (1 - sigmoid(beta (log(pi / pi_ref) - z_0))) for a good response, and of
    lambda_U (1 - sigmoid(beta (z_0 - log(pi / pi_ref)))) for a bad one: arXiv:2402.01306, eq. 8.

    The paper's loss is lambda_y - v, which is the same.

    Args:
        desirable: (B,) bool, whether a response is a good one.
        real: (B,) bool; false for filler rows, which add nothing.
        baseline: z_0, a scalar in nats, without a gradient; see `kl_baseline`.

    Returns:
        The loss, a scalar, and the sums `rows`, `loss`, `desirable_rows`, `desirable_reward`, `undesirable_reward`
        (beta log(pi / pi_ref) of good and of bad responses) and `z0` (the baseline once for each row).
    """
    reward = log_ratio(responses, options.beta)
    gain = reward - options.beta * baseline.detach().to(reward.dtype)
    lost = torch.where(
        desirable,
        options.desirable_weight * torch.sigmoid(-gain),
        options.undesirable_weight * torch.sigmoid(gain),
    )
    total = lost.masked_fill(~real, 0).sum()
    rows = real.sum(dtype=torch.float64)
    sums = {
        "rows": rows,
        "loss": total.detach().double(),
        "desirable_rows": (real & desirable).sum(dtype=torch.float64),
        "desirable_reward": masked_sum(reward, real & desirable),
        "undesirable_reward": masked_sum(reward, real & ~desirable),
        "z0": baseline.detach().double() * rows,
    }
    return total, sums


def kto_metrics(sums: Sums) -> Metrics:
    """Means, from merged sums: of the loss and z_0 over all rows, of the rewards over good and over bad responses, and
    the margin between these two. Of what there are no rows there is no mean."""
    average = means(sums, "rows")
    metrics = {"loss": average["loss"], "z0": average["z0"]}
    good = float(sums["desirable_rows"])
    bad = float(sums["rows"]) - good
    if good:
        metrics["desirable_reward"] = float(sums["desirable_reward"]) / good
    if bad:
        metrics["undesirable_reward"] = float(sums["undesirable_reward"]) / bad
    if good and bad:
        metrics["reward_margin"] = metrics["desirable_reward"] - metrics["undesirable_reward"]
    return metrics
