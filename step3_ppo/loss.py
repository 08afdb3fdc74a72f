"""Computes the losses of policy, KL and values, as sums over responses.

A loss comes back as a sum: the trainer scales it by world_size / N, with N what `loss_units` counts in the whole
optimizer step over all ranks, so that a token or a response weighs the same however the step is cut into
micro-batches and ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.training.metrics import Sums, masked_sum
from step3_ppo.loss_options import AGGREGATIONS, POLICY_LOSSES
from step3_ppo.rewards import LOG_RATIO_LIMIT, kl_estimate


def aggregate(losses: Tensor, response_mask: Tensor, aggregation: str) -> Tensor:
    """The sum of token losses (B, R), 0 outside the mask, whose quotient by `loss_units` is the loss.

    token: the mean over tokens, as in PPO for language models and DAPO (arXiv:2503.14476, eq. 8). sequence: the mean
    over responses of the mean over each one's tokens (GRPO, arXiv:2402.03300, eq. 3). constant: the sum over tokens by
    the number of responses and the longest possible response (Dr. GRPO, arXiv:2503.20783, sec. 3.2).
    """
    if aggregation == "sequence":
        losses = losses / response_mask.sum(1, keepdim=True).clamp_min(1)
    return losses.sum()


def loss_units(response_mask: Tensor, aggregation: str, longest: int) -> Tensor:
    """What the sums of `aggregate` are divided by: a long scalar. Responses without a token in the mask count nowhere.

    Args:
        response_mask: (B, R) bool.
        longest: the most tokens that a response may have, `--max_answer_seq_len`.
    """
    if aggregation == "token":
        return response_mask.sum()
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}: choose from {', '.join(AGGREGATIONS)}")
    return response_mask.any(1).sum() * (longest if aggregation == "constant" else 1)


def policy_loss_sum(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float,
    *,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    policy_loss: str = "ppo",
    aggregation: str = "token",
) -> tuple[Tensor, Sums]:
    """Sum over the mask of the token losses of a policy loss, with rho = pi / pi_old.

    ppo: max(-A rho, -A clip(rho)) (arXiv:1707.06347, eq. 7), clip with an upper side of its own (arXiv:2503.14476,
    eq. 8), and where A < 0 no more than -A dual_clip (arXiv:1912.09729, eq. 5).
    gspo: the same with the geometric mean of rho over the response in the place of rho (arXiv:2507.18071, eq. 5-7).
    Its gradient reaches each token with the token's own advantage (GSPO-token, eq. 13-14), which is GSPO itself where
    all tokens of a response have the same advantage.
    cispo: -A clip(rho) log pi, with no gradient through clip(rho): no token loses its gradient. (arXiv:2506.13585,
    eq. 4-5)

    Args:
        log_probs, old_log_probs, advantages: (B, R); log_probs alone carries a gradient.
        response_mask: (B, R) bool.
        clip_range, clip_range_high: clip to 1 - clip_range and 1 + clip_range_high; None: the same on both sides.
        dual_clip: None: no such limit.
        policy_loss: one of `POLICY_LOSSES`.
        aggregation: see `aggregate`.

    Returns:
        The loss (a scalar) and the sums `tokens`, `policy_loss`, `clip_fraction` (tokens whose gradient the clipping
        blocks; with cispo those whose weight it changes), `approx_kl` (k3 estimate in nats of KL(pi_old || pi)).
    """
    log_probs, old_log_probs, advantages = _inside(response_mask, log_probs, old_log_probs, advantages)
    low, high = 1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high)
    log_ratio = log_probs - old_log_probs
    if policy_loss == "ppo":
        losses, clipped = _clipped_surrogate(_ratio(log_ratio), advantages, low, high, dual_clip)
    elif policy_loss == "gspo":
        mean = log_ratio.detach().sum(1, keepdim=True) / response_mask.sum(1, keepdim=True).clamp_min(1)
        ratio = _ratio(mean) * (log_probs - log_probs.detach()).exp()  # the second factor is 1, but for its gradient
        losses, clipped = _clipped_surrogate(ratio, advantages, low, high, dual_clip)
    elif policy_loss == "cispo":
        ratio = _ratio(log_ratio.detach())
        weight = ratio.clamp(low, high)
        losses, clipped = -advantages * weight * log_probs, weight != ratio
    else:
        raise ValueError(f"unknown policy loss {policy_loss!r}: choose from {', '.join(POLICY_LOSSES)}")
    loss = aggregate(losses, response_mask, aggregation)
    sums = {
        "tokens": response_mask.sum(dtype=torch.float64),
        "policy_loss": loss.detach().double(),
        "clip_fraction": masked_sum(clipped, response_mask),
        "approx_kl": masked_sum(kl_estimate(old_log_probs, log_probs.detach(), "k3"), response_mask),
    }
    return loss, sums


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Losses of a ratio that is clipped where it has gained enough, and whether that blocks the gradient: (B, R)."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(low, high)
    losses, blocked = torch.maximum(unclipped, clipped), clipped > unclipped
    if dual_clip is not None:
        limit = -advantages * dual_clip
        beyond = (advantages < 0) & (losses > limit)
        losses, blocked = losses.where(~beyond, limit), blocked | beyond
    return losses, blocked


def kl_loss_sum(
    log_probs: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor,
    response_mask: Tensor,
    estimator: str,
    aggregation: str = "token",
) -> tuple[Tensor, Sums]:
    """Sum over the mask of rho * k, k an estimate of KL(pi || pi_ref), with the gradient of the KL itself.

    All (B, R); log_probs alone carries a gradient; response_mask bool; rho = pi / pi_old. With d = log pi - log pi_ref
    the gradient is that of sum(rho * d * grad log pi), rho and d held fixed. Its expectation over tokens of pi_old is,
    at every position, the exact gradient of KL(pi || pi_ref). The gradient is the same for all estimators, which only
    give the value: it is that of rho * k3 through rho and d, and that of rho * k2 through d. The gradient of rho * k1
    through both has one more term, rho * grad log pi; its expectation is 0, so it is left out as noise. Without rho the
    gradient of k1 would have the expectation 0, and that of k3 would be the gradient of KL(pi_ref || pi). The effect of
    a token on the KL of later tokens is not in this loss, only in the reward. Source: arXiv:2510.01555, sec. 4-5.
    GRPO as published differentiates k3 itself, without rho: that pulls with the gradient of KL(pi_ref || pi).

    Returns the loss (a scalar) and the sum `kl_loss`.
    """
    log_probs, old_log_probs, ref_log_probs = _inside(response_mask, log_probs, old_log_probs, ref_log_probs)
    now = log_probs.detach()
    ratio = (now - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    value = ratio * kl_estimate(now, ref_log_probs, estimator)
    pull = ratio * (now - ref_log_probs)
    loss = aggregate(value + pull * (log_probs - now), response_mask, aggregation)
    return loss, {"kl_loss": loss.detach().double()}


def value_loss_sum(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, clip_range: float | None
) -> tuple[Tensor, Sums]:
    """Sum over the mask of 0.5 max((V - R)^2, (V_clip - R)^2), V_clip = V_old + clip(V - V_old, +-range).

    All (B, R); values alone carries a gradient; response_mask bool; clip_range None: V_clip is V. Returns the loss (a
    scalar) and the sums `tokens`, `value_loss`, `value_clip_fraction` (tokens whose gradient the clipping blocks).
    """
    values, old_values, returns = _inside(response_mask, values, old_values, returns)
    unclipped = clipped = (values - returns).square()
    if clip_range is not None:
        clipped = (old_values + (values - old_values).clamp(-clip_range, clip_range) - returns).square()
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
