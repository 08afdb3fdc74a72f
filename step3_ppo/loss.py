"""Computes the clipped losses of PPO (arXiv:1707.06347), as sums over response tokens.

A loss comes back as a sum: the trainer scales it by world_size / N, with N the response tokens of the whole
optimizer step over all ranks, so that a token weighs the same however the step is cut into micro-batches and
ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.training.metrics import Sums, masked_sum
from step3_ppo.rewards import LOG_RATIO_LIMIT, kl_estimate


def policy_loss_sum(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, response_mask: Tensor, clip_range: float
) -> tuple[Tensor, Sums]:
    """Sum over the mask of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = pi / pi_old. (eq. 7)

    All (B, R); log_probs alone carries a gradient; response_mask bool. Returns the loss (a scalar) and the
    sums `tokens`, `policy_loss`, `clip_fraction` (tokens whose gradient the clipping blocks), `approx_kl` (k3
    estimate in nats of KL(pi_old || pi)).
    """
    log_probs, old_log_probs, advantages = _inside(response_mask, log_probs, old_log_probs, advantages)
    ratio = (log_probs - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(unclipped, clipped).sum()
    sums = {
        "tokens": response_mask.sum(dtype=torch.float64),
        "policy_loss": loss.detach().double(),
        "clip_fraction": masked_sum(clipped > unclipped, response_mask),
        "approx_kl": masked_sum(kl_estimate(old_log_probs, log_probs.detach(), "k3"), response_mask),
    }
    return loss, sums


def kl_loss_sum(
    log_probs: Tensor, old_log_probs: Tensor, ref_log_probs: Tensor, response_mask: Tensor, estimator: str
) -> tuple[Tensor, Sums]:
    """Sum over the mask of rho * k, k an estimate of KL(pi || pi_ref), with the gradient of the KL itself.

    All (B, R); log_probs alone carries a gradient; response_mask bool; rho = pi / pi_old. With d = log pi - log pi_ref
    the gradient is that of sum(rho * d * grad log pi), rho and d held fixed. Its expectation over tokens of pi_old is,
    at every position, the exact gradient of KL(pi || pi_ref). The gradient is the same for all estimators, which only
    give the value: it is that of rho * k3 through rho and d, and that of rho * k2 through d. The gradient of rho * k1
    through both has one more term, rho * grad log pi; its expectation is 0, so it is left out as noise. Without rho the
    gradient of k1 would have the expectation 0, and that of k3 would be the gradient of KL(pi_ref || pi). The effect of
    a token on the KL of later tokens is not in this loss, only in the reward. Source: arXiv:2510.01555, sec. 4-5.

    Returns the loss (a scalar) and the sum `kl_loss`.
    """
    log_probs, old_log_probs, ref_log_probs = _inside(response_mask, log_probs, old_log_probs, ref_log_probs)
    now = log_probs.detach()
    ratio = (now - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    value = ratio * kl_estimate(now, ref_log_probs, estimator)
    pull = ratio * (now - ref_log_probs)
    loss = (value + pull * (log_probs - now)).sum()
    return loss, {"kl_loss": loss.detach().double()}


def value_loss_sum(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, clip_range: float
) -> tuple[Tensor, Sums]:
    """Sum over the mask of 0.5 max((V - R)^2, (V_clip - R)^2), V_clip = V_old + clip(V - V_old, +-range).

    All (B, R); values alone carries a gradient; response_mask bool. Returns the loss (a scalar) and the sums
    `tokens`, `value_loss`, `value_clip_fraction` (tokens whose gradient the clipping blocks).
    """
    values, old_values, returns = _inside(response_mask, values, old_values, returns)
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    unclipped, clipped = (values - returns).square(), (clipped_values - returns).square()
    loss = 0.5 * torch.maximum(unclipped, clipped).sum()
    sums = {
        "tokens": response_mask.sum(dtype=torch.float64),
        "value_loss": loss.detach().double(),
        "value_clip_fraction": masked_sum(clipped > unclipped, response_mask),
    }
    return loss, sums


def explained_variance_sums(values: Tensor, returns: Tensor, response_mask: Tensor) -> Sums:
    """What `explained_variance` needs, of values and returns (B, R) over response_mask (B, R) bool."""
    returns = returns.double()
    errors = returns - values.double()
    return {
        "tokens": response_mask.sum(dtype=torch.float64),
        "returns": masked_sum(returns, response_mask),
        "squared_returns": masked_sum(returns.square(), response_mask),
        "errors": masked_sum(errors, response_mask),
        "squared_errors": masked_sum(errors.square(), response_mask),
    }


def explained_variance(sums: Sums) -> float:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for a constant one, below 0 for a worse one.

    Where the returns do not vary there is nothing to explain: 0.
    """
    tokens = sums["tokens"].clamp_min(1)
    mean_square = sums["squared_returns"] / tokens
    variance = mean_square - (sums["returns"] / tokens).square()
    unexplained = sums["squared_errors"] / tokens - (sums["errors"] / tokens).square()
    if variance <= 1e-12 * mean_square:  # no more than the rounding of the sums
        return 0.0
    return float(1 - unexplained / variance)


def _inside(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Zeros outside the mask, before any arithmetic: a NaN masked later would still poison gradients."""
    return [tensor.masked_fill(~mask, 0) for tensor in tensors]
