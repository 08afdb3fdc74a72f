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
    """

    name: str
    estimate: Estimate
    needs_critic: bool
    fewest_answers: int = 1
    options: tuple[str, ...] = ()

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
    name: str, *, needs_critic: bool, fewest_answers: int = 1, options: tuple[str, ...] = ()
) -> Callable[[Estimate], Estimator]:
    """Decorator that registers a function as an `Estimator`; the arguments are its attributes."""
    return lambda estimate: register(Estimator(name, estimate, needs_critic, fewest_answers, options))


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, and the returns R = A + V. (arXiv:1506.02438, eq. 16)

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  after the end both are 0.

    Args:
        rewards, values: (B, R).
        response_mask: (B, R) bool, true on a prefix of each row.

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
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    others = sizes[group] - 1
    if not others.all():
        raise ValueError("leave-one-out needs two responses or more to every prompt")
    # Subtracting the group's mean first avoids cancellation if all its rewards are large and similar:
    # G - (sum - G) / (k - 1) = (G - mean) * k / (k - 1).
    means = totals.new_zeros(len(sizes)).index_add(0, group, totals) / sizes
    advantages = (totals - means[group]) * sizes[group] / others
    return advantages[:, None].expand(rewards.shape).masked_fill(~response_mask, 0)


@estimator("gae", needs_critic=True, options=("gamma", "gae_lambda"))
def _gae(
    rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    if values is None:
        raise ValueError("gae needs the values of a critic")
    return gae(rewards, values, response_mask, gamma=config.gamma, lam=config.gae_lambda)


@estimator("rloo", needs_critic=False, fewest_answers=2)
def _rloo(
    rewards: Tensor, values: Tensor | None, response_mask: Tensor, groups: Tensor, config: PPOConfig
) -> tuple[Tensor, None]:
    return leave_one_out(rewards, response_mask, groups), None
