"""Advantages and returns from token rewards and values."""

from __future__ import annotations

import torch
from torch import Tensor

from common.training.metrics import masked_sum


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
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
