"""Combines KL and score into one reward per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.training.metrics import Sums, masked_sum
from step3_ppo.options import KL_ESTIMATORS

LOG_RATIO_LIMIT = 20.0  # nats; beyond it a ratio of probabilities is clamped, before exp can overflow


def kl_estimate(log_probs: Tensor, other_log_probs: Tensor, estimator: str) -> Tensor:
    """One-sample estimates, in nats, of KL(p || q) at tokens drawn from p. Any shape; elementwise.

    With d = log p - log q:  k1 = d (unbiased);  k2 = d^2 / 2 (biased, never negative);  k3 = exp(-d) - 1 + d
    (unbiased, never negative). Source: "Approximating KL Divergence" (blog post, 2020). For monitoring, and k1 for
    rewards; their gradients are not those of the KL, see `loss.kl_loss_sum`.
    """
    d = log_probs - other_log_probs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        d = d.clamp_min(-LOG_RATIO_LIMIT)
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {estimator!r}: choose from {', '.join(KL_ESTIMATORS)}")


@dataclass(frozen=True)
class WeightedScores:
    """The sum of K rewards, each normalised and clipped by itself, then times its weight.

    clipped: 1 where a reward was clipped.
    """

    scores: Tensor  # (B,) float32
    clipped: Tensor  # (B, K) float32


def weigh_scores(
    raw: Tensor, failed: Tensor, *, weights: Tensor, means: Tensor, stds: Tensor, clip: float
) -> WeightedScores:
    """s = sum_k w_k clip((s_k - mean_k) / std_k, +-clip), where a reward that failed on a response counts 0.

    Args:
        raw: (B, K).
        failed: (B, K) bool.
        weights, means, stds: (K,).
    """
    normalised = ((raw.float() - means) / stds).masked_fill(failed, 0.0)
    clipped = normalised.clamp(-clip, clip)
    return WeightedScores((clipped * weights).sum(1), (clipped != normalised).float())


@dataclass(frozen=True)
class ShapedScores:
    """Scores as PPO sees them, and sums over the real responses.

    sums: `responses` (their number), `raw_score`, `score` (shaped), `clipped`, `finished` (how many were), and, where
    there is one, `overlong_penalty`.
    """

    scores: Tensor  # (B,) float32
    sums: Sums
    clipped: Tensor | None = None  # (B, K) float32, of several rewards as of `WeightedScores`


def shape_scores(
    scores: Tensor,
    finished: Tensor,
    real: Tensor,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    clip: float = 5.0,
    missing_eos_penalty: float = 0.0,
    missing_eos_score: float | None = None,
    overlong: Tensor | None = None,
    weighted: WeightedScores | None = None,
) -> ShapedScores:
    """Normalise scores, clip them to +-clip, then lower those of responses that are too long or were cut by length.

    Args:
        scores: (B,) raw.
        finished, real: (B,) bool.
        mean, std: of the reward model's raw scores, from its provenance.
        missing_eos_penalty: subtracted from the score of an unfinished response, in normalised units.
        missing_eos_score: if given, the score of an unfinished response, whatever else would come off it.
        overlong: (B,) subtracted from the scores, in normalised units; see `overlong_penalties`. None: nothing.
        weighted: of several rewards, in the place of the normalised and clipped scores.
    """
    if std <= 0:
        raise ValueError(f"the standard deviation of the reward model's scores must be positive, not {std}")
    if weighted is None:
        normalised = (scores.float() - mean) / std
        clipped = normalised.clamp(-clip, clip)
        was_clipped = normalised != clipped
    else:
        clipped, was_clipped = weighted.scores, weighted.clipped.mean(1)
    shaped = clipped if overlong is None else clipped - overlong
    if missing_eos_score is None:
        shaped = shaped - missing_eos_penalty * (~finished)
    else:
        shaped = shaped.masked_fill(~finished, missing_eos_score)
    sums = {
        "responses": masked_sum(torch.ones_like(shaped), real),
        "raw_score": masked_sum(scores, real),
        "score": masked_sum(shaped, real),
        "clipped": masked_sum(was_clipped, real),
        "finished": masked_sum(finished, real),
        **({} if overlong is None else {"overlong_penalty": masked_sum(overlong, real)}),
    }
    return ShapedScores(shaped, sums, None if weighted is None else weighted.clipped)


def overlong_penalties(response_lengths: Tensor, longest: int, buffer: int, most: float) -> Tensor | None:
    """The soft penalty of over-long responses: most * clip((length - (longest - buffer)) / buffer, 0, 1).

    0 up to `longest - buffer` tokens, then linear, `most` at `longest`. Source: DAPO, arXiv:2503.14476, eq. 13, which
    has most = 1 and the opposite sign.

    Args:
        response_lengths: (B,) long, tokens, the end token included.
        longest: tokens after which a response is cut.
        buffer: tokens, at most `longest`; 0: there is no penalty.
        most: in normalised score.

    Returns:
        (B,) float32, at least 0; None if there is no penalty.
    """
    if not buffer:
        return None
    return most * ((response_lengths - (longest - buffer)).float() / buffer).clamp(0, 1)


def token_rewards(log_ratio: Tensor | None, scores: Tensor, response_mask: Tensor, beta: float) -> Tensor:
    """r_t = -beta * d_t, plus the score at the last response token; 0 outside the mask.

    No other estimator of the KL than d itself belongs here: E[d grad log pi] is the gradient of the KL, while that of
    d^2 / 2 or exp(-d) - 1 + d nearly vanishes near the reference. Source: arXiv:2203.02155, eq. 2; arXiv:2510.01555.

    Args:
        log_ratio: (B, R), d = log pi - log pi_ref in nats; None: there is no reference, and d counts as 0.
        scores: (B,) shaped.
        response_mask: (B, R) bool.

    Returns:
        (B, R) rewards.
    """
    last = response_mask.sum(1, keepdim=True) - 1
    at_last = torch.arange(response_mask.shape[1], device=response_mask.device) == last
    score = torch.where(at_last, scores[:, None], 0.0)
    return score if log_ratio is None else (-beta * log_ratio).masked_fill(~response_mask, 0) + score
