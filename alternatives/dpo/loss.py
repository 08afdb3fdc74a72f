"""Computes the losses of direct preference optimisation and its family, as a sum over pairs.

Each loss is a function of one number per pair, the gap between the implicit rewards of the chosen and the rejected
response: r(chosen) - r(rejected). What differs is what a response's implicit reward is, and what is asked of the gap.

The command line reads the names of `LOSSES` before torch is imported, so this module imports torch in its functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from common.training.metrics import Sums


@dataclass(frozen=True)
class Responses:
    """B responses under the model that is trained, and under the reference.

    Attributes:
        log_probs: (B,) log pi(y | x), summed over the response's tokens, in nats.
        reference: (B,) the same under the reference; zeros where a loss needs none.
        lengths: (B,) long, tokens of each response.
    """

    log_probs: Tensor
    reference: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class LossOptions:
    """The numbers that losses read.

    Attributes:
        beta: weight of the implicit reward; for `orpo` of the preference term.
        label_smoothing: the probability that a pair's label is wrong.
        target_margin: the gap that is asked for, of `simpo`.
        sft_coef: weight of the chosen response's negative log-likelihood, a mean over its tokens.
    """

    beta: float
    label_smoothing: float = 0.0
    target_margin: float = 0.0
    sft_coef: float = 0.0


ImplicitReward = Callable[[Responses, float], "Tensor"]  # (responses, beta) -> (B,)
GapLoss = Callable[["Tensor", LossOptions], "Tensor"]  # (gap (B,), options) -> (B,)


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss on pairs.

    Attributes:
        reward: the implicit reward of responses.
        of_gap: the loss of each pair, from the gap between its rewards.
        needs_reference: whether the reward compares with a reference model.
        options: those of `LossOptions` that it reads besides beta and sft_coef.
        sft_coef: the weight of the SFT term in its paper.
    """

    reward: ImplicitReward
    of_gap: GapLoss
    needs_reference: bool = True
    options: tuple[str, ...] = ()
    sft_coef: float = 0.0


def log_ratio(responses: Responses, beta: float) -> Tensor:
    """beta log(pi(y) / pi_ref(y)): arXiv:2305.18290, eq. 5 without the term of the prompt, which the gap cancels."""
    return beta * (responses.log_probs - responses.reference)


def mean_log_ratio(responses: Responses, beta: float) -> Tensor:
    """`log_ratio` over the number of tokens: arXiv:2411.15124, eq. 6."""
    return log_ratio(responses, beta) / responses.lengths


def mean_log_prob(responses: Responses, beta: float) -> Tensor:
    """beta log pi(y) / |y|: arXiv:2405.14734, eq. 4."""
    return beta * responses.log_probs / responses.lengths


def log_odds(responses: Responses, beta: float) -> Tensor:
    """log(p / (1 - p)) for p = pi(y) ** (1 / |y|): arXiv:2403.07691, eq. 4. `beta` is not used."""
    import torch

    log_p = responses.log_probs / responses.lengths
    # log(1 - exp(x)) is log(-expm1(x)) near 0; it is kept finite where a response is certain.
    tiny = torch.finfo(log_p.dtype).tiny
    return log_p - (-torch.expm1(log_p)).clamp_min(tiny).log()


def sigmoid(gap: Tensor, options: LossOptions) -> Tensor:
    """-(1 - e) log sigmoid(gap) - e log sigmoid(-gap) with the label smoothing e: DPO, arXiv:2305.18290, eq. 7; with e
    above 0 conservative DPO, as in arXiv:2403.00409, eq. 8."""
    from torch.nn import functional as F

    wrong = options.label_smoothing
    return -(1 - wrong) * F.logsigmoid(gap) - wrong * F.logsigmoid(-gap)


def robust(gap: Tensor, options: LossOptions) -> Tensor:
    """(-(1 - e) log sigmoid(gap) + e log sigmoid(-gap)) / (1 - 2 e): unbiased where a share e of the labels is wrong,
    arXiv:2403.00409, eq. 10."""
    from torch.nn import functional as F

    wrong = options.label_smoothing
    return (-(1 - wrong) * F.logsigmoid(gap) + wrong * F.logsigmoid(-gap)) / (1 - 2 * wrong)


def squared(gap: Tensor, options: LossOptions) -> Tensor:
    """(gap / beta - 1 / (2 beta))^2: IPO, arXiv:2310.12036, eq. 17, whose tau is beta."""
    return (gap / options.beta - 1 / (2 * options.beta)).square()


def hinge(gap: Tensor, options: LossOptions) -> Tensor:
    """max(0, 1 - gap): SLiC-HF, arXiv:2305.10425, eq. 1, on the gap of `log_ratio` as in arXiv:2309.06657."""
    return (1 - gap).clamp_min(0)


def with_margin(gap: Tensor, options: LossOptions) -> Tensor:
    """-log sigmoid(gap - gamma): SimPO, arXiv:2405.14734, eq. 6, whose gamma is `target_margin`."""
    from torch.nn import functional as F

    return -F.logsigmoid(gap - options.target_margin)


def weighted_odds(gap: Tensor, options: LossOptions) -> Tensor:
    """-beta log sigmoid(gap): ORPO, arXiv:2403.07691, eqs. 6 and 7, whose lambda is beta."""
    from torch.nn import functional as F

    return -options.beta * F.logsigmoid(gap)


# By the name that --loss_type takes.
LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(log_ratio, sigmoid, options=("label_smoothing",)),
    "robust": PreferenceLoss(log_ratio, robust, options=("label_smoothing",)),
    "ipo": PreferenceLoss(log_ratio, squared),
    "hinge": PreferenceLoss(log_ratio, hinge),
    "sigmoid_norm": PreferenceLoss(mean_log_ratio, sigmoid, options=("label_smoothing",)),
    "simpo": PreferenceLoss(mean_log_prob, with_margin, needs_reference=False, options=("target_margin",)),
    "orpo": PreferenceLoss(log_odds, weighted_odds, needs_reference=False, sft_coef=1.0),
}


def preference_loss_sum(
    loss: PreferenceLoss, chosen: Responses, rejected: Responses, real: Tensor, options: LossOptions
) -> tuple[Tensor, Sums]:
    """Sum over the real pairs of the loss of the gap, and of sft_coef times -log pi(chosen) / |chosen| (the SFT term:
    arXiv:2404.19733, eq. 1).

    Args:
        real: (B,) bool; false for filler pairs, which add nothing.

    Returns:
        The loss, a scalar, and the sums `pairs`, `loss`, `accuracy` (a tie counts a half), `reward_margin` (the gap),
        `chosen_reward`, `rejected_reward`, `chosen_log_prob`, `rejected_log_prob` (per token) and `sft_loss`.
    """
    import torch

    from common.training.metrics import masked_sum

    rewards = [loss.reward(responses, options.beta) for responses in (chosen, rejected)]
    gap = rewards[0] - rewards[1]
    sft = -chosen.log_probs / chosen.lengths
    of_pairs = loss.of_gap(gap, options) + options.sft_coef * sft
    total = of_pairs.masked_fill(~real, 0).sum()
    sums = {
        "pairs": real.sum(dtype=torch.float64),
        "loss": total.detach().double(),
        "accuracy": masked_sum((gap.sign() + 1) / 2, real),
        "reward_margin": masked_sum(gap, real),
        "chosen_reward": masked_sum(rewards[0], real),
        "rejected_reward": masked_sum(rewards[1], real),
        "chosen_log_prob": masked_sum(chosen.log_probs / chosen.lengths, real),
        "rejected_log_prob": masked_sum(rejected.log_probs / rejected.lengths, real),
        "sft_loss": masked_sum(sft, real),
    }
    return total, sums
