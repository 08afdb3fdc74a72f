"""Step 3 on the task of benchmarks/proof/closed_form.py, as it is and with one defect at a time.

    python tests/end_to_end/closed_form_cases.py DIRECTORY ITERATIONS CASE...

Prints one JSON object for each case: its name, `total_variation`, and whether it `reached` the optimum.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

import step3_ppo.advantages as advantages
import step3_ppo.learner as learner
import step3_ppo.models as models
import step3_ppo.trainer as trainer
from benchmarks.proof.closed_form import outcome_of
from common.models.logprobs import gather_response
from common.runtime.program import finish
from step3_ppo.generation.rollout import Rollout

BETA = 0.5
Defect = Callable[[], AbstractContextManager]
whole_mask = Rollout.response_mask.func
token_rewards, policy_loss_sum = trainer.token_rewards, learner.policy_loss_sum


def mask_is(change) -> Defect:
    """The response mask replaced by `change` of itself and the rollout."""
    return lambda: patch.object(
        Rollout, "response_mask", property(lambda rollout: change(whole_mask(rollout), rollout))
    )


def without_first_token(mask, rollout):
    return mask & (torch.arange(mask.shape[1]) > 0)


def without_end_token(mask, rollout):
    last = torch.arange(mask.shape[1]) == rollout.response_lengths[:, None] - 1
    return mask & ~(last & rollout.finished[:, None])


def token_rewards_are(change) -> Defect:
    return lambda: patch.object(trainer, "token_rewards", change)


def score_one_token_early(log_ratio, scores, mask, beta):
    rewards = token_rewards(log_ratio, torch.zeros_like(scores), mask, beta)
    row = torch.arange(len(mask))
    rewards[row, (mask.sum(1) - 2).clamp_min(0)] += scores
    return rewards


def flipped_loss(log_probs, old_log_probs, advantages, *args, **options):
    return policy_loss_sum(log_probs, old_log_probs, -advantages, *args, **options)


def same_length_baseline(rewards, mask, groups):
    """Leave-one-out less the mean of responses of the same length, which depends on what was sampled."""
    totals, lengths = rewards.sum(1), mask.sum(1)
    rest = torch.stack([totals[lengths == length].mean() for length in lengths])
    return (totals - rest)[:, None].expand(rewards.shape).masked_fill(~mask, 0)


def reference_follows(self, rollout):
    return self.log_probs_and_entropy(rollout)[0]


# Name: estimator or variant, the defect.
CASES: dict[str, tuple[str, Defect]] = {
    "rloo": ("rloo", nullcontext),
    "gae": ("gae", nullcontext),
    "flipped_kl": (
        "rloo",
        token_rewards_are(lambda log_ratio, scores, mask, beta: token_rewards(log_ratio, scores, mask, -beta)),
    ),
    "flipped_loss": (
        "rloo",
        lambda: patch.object(learner, "policy_loss_sum", flipped_loss),
    ),
    "mask_without_first_token": ("rloo", mask_is(without_first_token)),
    "mask_without_end_token": ("rloo", mask_is(without_end_token)),
    "score_one_token_early": ("gae", token_rewards_are(score_one_token_early)),
    "values_one_token_late": (
        "gae",
        lambda: patch.object(
            models, "gather_response", lambda values, prompt, own: gather_response(values, prompt + 1, own)
        ),
    ),
    "baseline_of_same_length": ("rloo", lambda: patch.object(advantages, "leave_one_out", same_length_baseline)),
    "reference_that_follows": (
        "rloo",
        lambda: patch.object(models.PPOModels, "reference_log_probs", reference_follows),
    ),
}


def main(directory: str, iterations: str, *names: str) -> None:
    for name in names:
        estimator, defect = CASES[name]
        with defect():
            outcome = outcome_of(estimator, BETA, int(iterations), Path(directory), label=f"-{name}")
        print(json.dumps({"case": name, "reached": outcome.reached, **vars(outcome)}), flush=True)
    finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
