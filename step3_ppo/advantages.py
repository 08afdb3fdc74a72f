"""Advantages and returns from token rewards and values."""
from __future__ import annotations

import torch
from torch import Tensor

from common.sums import GlobalSum, masked_sum, on_this_rank


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, and the returns R = A + V. (arXiv:1506.02438, eq. 16)

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  after the end both are 0.
    rewards, values (B, R); response_mask (B, R) bool, true on a prefix of each row.
    Returns advantages and returns, both (B, R) and 0 outside the mask.
    """
    rewards, values = rewards.masked_fill(~response_mask, 0), values.masked_fill(~response_mask, 0)
    advantages = torch.zeros_like(rewards)
    advantage = next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def whiten(
    advantages: Tensor, response_mask: Tensor, global_sum: GlobalSum = on_this_rank, epsilon: float = 1e-8
) -> Tensor:
    """(A - mean) / sqrt(var + epsilon) over the response tokens of all ranks; 0 outside the mask.

    advantages (B, R); response_mask (B, R) bool. Every rank must call it: `global_sum` is used twice, on
    float64 tensors. The variance is the mean square of the deviations, and is taken after the mean so that it
    loses no digits.
    """
    count, total = global_sum(
        torch.stack([response_mask.sum(dtype=torch.float64), masked_sum(advantages, response_mask)])
    )
    count = count.clamp_min(1)
    deviations = advantages.double() - total / count
    variance = global_sum(masked_sum(deviations.square(), response_mask)) / count
    whitened = deviations / (variance + epsilon).sqrt()
    return whitened.masked_fill(~response_mask, 0).to(advantages.dtype)
