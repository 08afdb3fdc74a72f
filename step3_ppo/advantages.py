"""Registers advantage estimators, which turn token rewards into the advantages of the policy loss.

`ESTIMATORS` has all of them by name; `--advantage` chooses one. A new one is a function with `@estimator` above it.

The command line reads the names from here before torch is imported, so this module calls tensors' own methods only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from step3_ppo.config import PPOConfig

    Estimate = Callable[
        [Tensor, Tensor | None, Tensor, Tensor, PPOConfig],
        tuple[Tensor, Tensor | None],
    ]


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator and what it needs.

    Attributes:
        name: the value of `--advantage`.
        estimate: the function itself; see `__call__`.
        needs_critic: whether it reads values; without a critic none is built, trained or saved.
        fewest_answers: the smallest `--answers_per_prompt` that it is defined for.
        options: names of the options that it reads; those of the other estimators have no effect beside it.
        whitens: whether its definition brings the advantages of a batch to mean 0 and variance 1.
        aggregation: the `--loss_aggregation` of its paper.
        kl_placement: the `--kl_placement` of its paper.
    """

    name: str
    estimate: Estimate
    needs_critic: bool
    fewest_answers: int = 1
    options: tuple[str, ...] = ()
    whitens: bool = True
    aggregation: str = "token"
    kl_placement: str = "reward"

    def __call__(
        self, rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor, config: PPOConfig
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages, and returns where there is a critic, of all responses of an iteration.

        Args:
            rewards: (B, R) token rewards in units of the normalised score, 0 outside the mask.
            values: (B, R) of the critic in the same units; None without a critic.
            response_mask: (B, R) bool, true on a prefix of each row.
            groups: (B,) long; responses with equal numbers answer the same prompt.
            config: the options of step 3.

        Returns:
            advantages (B, R), 0 outside the mask, not whitened; returns (B, R), the critic's targets, or None.
        """
        return self.estimate(rewards, values, response_mask, groups, config)


ESTIMATORS: dict[str, Estimator] = {}


def register(estimator: Estimator) -> Estimator:
    """Make an estimator known to `--advantage`.

    Raises:
        ValueError: another one has its name.
    """
    if ESTIMATORS.setdefault(estimator.name, estimator) is not estimator:
        raise ValueError(f"there is an advantage estimator named {estimator.name} already: choose another name")
    return estimator


def estimator(
    name: str,
    *,
    needs_critic: bool,
    fewest_answers: int = 1,
    options: tuple[str, ...] = (),
    whitens: bool = True,
    aggregation: str = "token",
    kl_placement: str = "reward",
) -> Callable[[Estimate], Estimator]:
    """Decorator that registers a function as an `Estimator`; the arguments are its attributes."""
    return lambda estimate: register(
        Estimator(name, estimate, needs_critic, fewest_answers, options, whitens, aggregation, kl_placement)
    )


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, and the returns R = A + V. (arXiv:1506.02438, eq. 16)

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  after the end both are 0.

    Args:
        rewards, values: (B, R).
        response_mask: (B, R) bool, true on a prefix of each row.
        lam: one for all responses, or (B,) one for each.

    Returns:
        Advantages and returns, both (B, R) and 0 outside the mask.
    """
    rewards, values = rewards.masked_fill(~response_mask, 0), values.masked_fill(~response_mask, 0)
    advantages = rewards.new_zeros(rewards.shape)
    advantage = next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def leave_one_out(rewards: Tensor, response_mask: Tensor, groups: Tensor) -> Tensor:
    """REINFORCE leave-one-out: a response's reward less the mean of the others to its prompt. (arXiv:2402.14740, RLOO)

    With G the sum of a response's token rewards (its score minus beta times its KL) and k responses to its prompt:
    A = G - (sum of the other responses' G) / (k - 1), the same for each token of the response.

    Args:
        rewards: (B, R).
        response_mask: (B, R) bool.
        groups: (B,) long, the same number for all responses to one prompt.

    Returns:
        (B, R) advantages, 0 outside the mask.

    Raises:
        ValueError: a response is alone in its group.
    """
    totals = rewards.masked_fill(~response_mask, 0).sum(1)
    differences, group, sizes = _less_group_mean(totals, groups)
    # Subtracting the group's mean first avoids cancellation if all its rewards are large and similar:
    # G - (sum - G) / (k - 1) = (G - mean) * k / (k - 1).
    advantages = differences * sizes[group] / (sizes[group] - 1)
    return advantages[:, None].expand(rewards.shape).masked_fill(~response_mask, 0)


def length_adaptive_lambda(response_mask: Tensor, alpha: float) -> Tensor:
    """lam = 1 - 1 / (alpha l) of a response of l tokens, never below 0. (arXiv:2504.05118, sec. 4.2)

    So the weights lam^k of the errors of later tokens add up to alpha l: the horizon grows with the response.

    Args:
        response_mask: (B, R) bool.

    Returns:
        (B,) float64.
    """
    lengths = response_mask.sum(1).double()
    return (1 - 1 / (alpha * lengths.clamp_min(1))).clamp_min(0)


def returns_to_go(rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    """The rewards still to come, discounted. (arXiv:2501.03262, the advantage of REINFORCE++ before normalisation)

    A_t = sum over k >= t of gamma^(k - t) r_k. With the KL in the rewards and gamma 1 that is the score less beta times
    the log-ratios of this token and of those after it.

    Args:
        rewards: (B, R).
        response_mask: (B, R) bool, true on a prefix of each row.

    Returns:
        (B, R), 0 outside the mask.
    """
    rewards = rewards.masked_fill(~response_mask, 0)
    advantages, total = rewards.new_zeros(rewards.shape), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        total = rewards[:, t] + gamma * total
        advantages[:, t] = total
    return advantages


def group_relative(rewards: Tensor, response_mask: Tensor, groups: Tensor, *, divide_by_std: bool) -> Tensor:
    """A response's reward less the mean of its group, itself included, and perhaps divided by the group's spread.

    With G the sum of a response's token rewards: A = G - mean(G) (Dr. GRPO, arXiv:2503.20783, sec. 3.2), or
    A = (G - mean(G)) / (std(G) + 1e-6) (GRPO, arXiv:2402.03300, sec. 4.1.2), the same for each token of the response.
    std is the sample's, with k - 1 for k responses; the paper leaves that open. Groups of equal rewards have A = 0.

    Args:
        rewards: (B, R).
        response_mask: (B, R) bool.
        groups: (B,) long, the same number for all responses to one prompt.

    Returns:
        (B, R) advantages, 0 outside the mask.

    Raises:
        ValueError: a response is alone in its group.
    """
    # In float64, since the rounding of a mean in float32 would be taken for a spread where all rewards are equal.
    totals = rewards.double().masked_fill(~response_mask, 0).sum(1)
    advantages, group, sizes = _less_group_mean(totals, groups)
    if divide_by_std:
        squares = totals.new_zeros(len(sizes)).index_add(0, group, advantages.square())
        advantages = advantages / ((squares / (sizes - 1)).sqrt() + 1e-6)[group]
    return advantages[:, None].expand(rewards.shape).masked_fill(~response_mask, 0).to(rewards.dtype)


def _less_group_mean(totals: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each response's reward less the mean of its group.

    Args:
        totals: (B,) whole rewards of responses.
        groups: (B,) long, the same number for all responses to one prompt.

    Returns:
        The differences (B,); the group of each response (B,) long, counted from 0; the responses in each group (G,).

    Raises:
        ValueError: a response is alone in its group.
    """
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    if not (sizes > 1).all():
        raise ValueError("comparing answers needs two responses or more to every prompt")
    means = totals.new_zeros(len(sizes)).index_add(0, group, totals) / sizes
    return totals - means[group], group, sizes


@estimator("gae", needs_critic=True, options=("gamma", "gae_lambda", "gae_lambda_alpha", "critic_gae_lambda"))
def _gae(
    rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    if values is None:
        raise ValueError("gae needs the values of a critic")
    lam: float | Tensor = config.gae_lambda
    if config.gae_lambda_alpha is not None:
        lam = length_adaptive_lambda(response_mask, config.gae_lambda_alpha).to(rewards.dtype)
    advantages, returns = gae(rewards, values, response_mask, gamma=config.gamma, lam=lam)
    if config.critic_gae_lambda is not None:
        returns = gae(rewards, values, response_mask, gamma=config.gamma, lam=config.critic_gae_lambda)[1]
    return advantages, returns


@estimator("rloo", needs_critic=False, fewest_answers=2)
def _rloo(
    rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    return leave_one_out(rewards, response_mask, groups), None


@estimator("grpo", needs_critic=False, fewest_answers=2, whitens=False, aggregation="sequence", kl_placement="loss")
def _grpo(
    rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    return group_relative(rewards, response_mask, groups, divide_by_std=True), None


@estimator("dr_grpo", needs_critic=False, fewest_answers=2, whitens=False, aggregation="constant", kl_placement="loss")
def _dr_grpo(
    rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    return group_relative(rewards, response_mask, groups, divide_by_std=False), None


@estimator("reinforce++", needs_critic=False, options=("gamma",))
def _reinforce_plus_plus(
    rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    return returns_to_go(rewards, response_mask, config.gamma), None


@estimator("reinforce++_baseline", needs_critic=False, fewest_answers=2, kl_placement="loss")
def _reinforce_plus_plus_baseline(
    rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    return group_relative(rewards, response_mask, groups, divide_by_std=False), None
