"""Computes whether the update learns from the right samples: the sampler's gap, and the spread of the ratio."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.training.metrics import Metrics, Sums, add_sums, masked_sum
from step3_ppo.rewards import LOG_RATIO_LIMIT

RATIO_SUMS = ("ratio_tokens", "ratio", "squared_ratio", "ratio_max")


def sampler_gap(sampling_log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor) -> Metrics:
    """Mean and maximum over response tokens of |log pi_sampler - log pi_old|, in nats.

    Args:
        sampling_log_probs: (B, R) log-probs in the distributions that the tokens were drawn from.
        old_log_probs: (B, R) of the training model's own pass over the finished rollout.
        response_mask: (B, R) bool.
    """
    gap = (sampling_log_probs - old_log_probs)[response_mask].double().abs()
    if not len(gap):
        return {"sampler_gap_mean": 0.0, "sampler_gap_max": 0.0}
    return {"sampler_gap_mean": float(gap.mean()), "sampler_gap_max": float(gap.max())}


def ratio_sums(log_probs: Tensor, old_log_probs: Tensor, response_mask: Tensor) -> Sums:
    """What `ratio_metrics` needs of rho = pi / pi_old at the response tokens; all (B, R), response_mask bool."""
    ratio = (log_probs.detach() - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).double().exp()
    return {
        "ratio_tokens": response_mask.sum(dtype=torch.float64),
        "ratio": masked_sum(ratio, response_mask),
        "squared_ratio": masked_sum(ratio.square(), response_mask),
        "ratio_max": ratio.masked_fill(~response_mask, 0).max(),
    }


def ratio_metrics(steps: Sequence[Sums]) -> Metrics:
    """Mean, standard deviation and maximum of rho over the tokens of all optimizer steps, and the mean over the steps
    of the effective sample size (sum rho)^2 / (n sum rho^2), n the tokens of the step: 1 where all weigh the same.

    Args:
        steps: of each step the sums of `ratio_sums`, over all ranks.
    """
    total = add_sums([{name: step[name] for name in RATIO_SUMS} for step in steps])
    tokens = total["ratio_tokens"].clamp_min(1)
    mean = total["ratio"] / tokens
    sizes = [
        step["ratio"].square() / (step["ratio_tokens"] * step["squared_ratio"])
        for step in steps
        if float(step["ratio_tokens"])
    ]
    return {
        "ratio_mean": float(mean),
        "ratio_std": float((total["squared_ratio"] / tokens - mean.square()).clamp_min(0).sqrt()),
        "ratio_max": float(total["ratio_max"]),
        "effective_sample_size": float(torch.stack(sizes).mean()) if sizes else 0.0,
    }
