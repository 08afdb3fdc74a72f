"""Controls beta, the coefficient of the KL penalty: fixed, or adapted towards a target KL."""

from __future__ import annotations

import math

from step3_ppo.config import PPOConfig


class FixedKL:
    """A constant beta."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def update(self, kl: float, responses: int) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = float(state["beta"])


class AdaptiveKL(FixedKL):
    """Steers the KL to a target: a proportional controller on log beta. (arXiv:1909.08593, sec. 2.2)

    e = clip(KL / target - 1, +-0.2);  beta <- beta * (1 + e * n / horizon), with n / horizon at most 1: no
    iteration, however large, moves beta by more than a fifth or turns its sign.
    """

    def __init__(self, beta: float = 0.2, target: float = 6.0, horizon: float = 10_000) -> None:
        if beta <= 0 or target <= 0 or horizon <= 0:
            raise ValueError("the adaptive KL controller needs a positive beta, target and horizon")
        super().__init__(beta)
        self.target = target  # nats per response
        self.horizon = horizon  # responses

    def update(self, kl: float, responses: int) -> None:
        """kl: mean over responses of the KL summed over their tokens, in nats; responses: their number."""
        if math.isnan(kl):
            raise ValueError("the KL to the reference is not a number: some log-probabilities are broken")
        error = max(-0.2, min(0.2, kl / self.target - 1))
        self.beta *= 1 + error * min(responses / self.horizon, 1.0)


def kl_controller(config: PPOConfig) -> FixedKL:
    """The controller that --kl_controller names."""
    if config.kl_controller == "adaptive":
        return AdaptiveKL(config.first_kl_coef, config.kl_target, config.kl_horizon)
    return FixedKL(config.first_kl_coef)
