"""Stops training when KL or reward exceed their limits, and warns where most scores are clipped."""

from __future__ import annotations

import torch

from common.errors import Diverged
from common.runtime.distributed import say
from step3_ppo.config import PPOConfig
from step3_ppo.rewards import ShapedScores
from step3_ppo.scoring import ModelOutputs

CLIPPED_SHARE = 0.5  # of the scores; if more are clipped, most of what the reward says is lost


def warn_of_clipped(config: PPOConfig, shaped: ShapedScores, when: str) -> bool:
    """Whether most scores are clipped; if so, say what to do about it."""
    share = float(shaped.sums["clipped"] / shaped.sums["responses"].clamp_min(1))
    if share > CLIPPED_SHARE:
        say(
            f"warning: {share:.0%} of the scores of {when} are beyond --score_clip {config.score_clip:g} and count as "
            "if they were at it, so little can be learnt from them: raise it, or measure scores in their own mean and "
            "spread with --score_calibration rollout or running"
        )
    return share > CLIPPED_SHARE


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
