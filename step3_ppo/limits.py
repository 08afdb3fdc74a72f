"""Stops training when KL or reward exceed their limits."""

from __future__ import annotations

import torch

from common.errors import Diverged
from step3_ppo.config import PPOConfig
from step3_ppo.scoring import ModelOutputs


def check_limits(config: PPOConfig, outputs: ModelOutputs, when: str) -> None:
    """Raise Diverged on all ranks alike, before the update, if KL or reward is beyond a limit of the options."""
    kl = outputs.response_kl()
    of_kl = [] if kl is None else [("KL to the reference", kl.mean(), "max_kl", config.kl_limit, torch.gt)]
    for what, mean, flag, limit, exceeded in (
        *of_kl,
        ("reward", outputs.scores.mean(), "max_reward", config.max_reward, torch.gt),
        ("reward", outputs.scores.mean(), "min_reward", config.min_reward, torch.lt),
    ):
        if limit is not None and exceeded(mean, limit):
            raise Diverged(
                f"the mean {what} of the answers of {when} is {float(mean):.4g}, beyond "
                f"--{flag} {limit:g}: training stopped before it learnt from them; "
                f"{'raise --kl_coef' if config.has_reference else 'add --kl_placement reward'}, "
                "lower --actor_learning_rate, or set another limit"
            )
