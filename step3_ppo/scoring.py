"""What the models and the reward say of a rollout, before the update."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.config.option import Phase
from common.training.timing import PhaseClock
from step3_ppo.calibration import ScoreScale
from step3_ppo.config import PPOConfig
from step3_ppo.generation.rollout import Rollout
from step3_ppo.models import PPOModels, evaluating
from step3_ppo.reward import Reward, RewardInputs
from step3_ppo.sharing import compute_on_all_ranks


@dataclass(frozen=True)
class ModelOutputs:
    """Row b belongs to row b of the rollout. On the CPU of every rank."""

    old_log_probs: Tensor  # (B, R) nats, of the actor
    ref_log_probs: Tensor  # (B, R) nats, of the reference
    entropy: Tensor  # (B, R) nats, of the actor's next-token distribution
    values: Tensor | None  # (B, R) normalised score units, of the critic; None without one
    scores: Tensor  # (B,) raw scores of the reward

    def response_kl(self) -> Tensor:
        """(B,) log-ratio of actor to reference summed over each response: the k1 estimate of its KL, in nats."""
        return (self.old_log_probs - self.ref_log_probs).sum(1)


@torch.no_grad()
def score_rollout(
    models: PPOModels, reward: Reward, inputs: RewardInputs, clock: PhaseClock, config: PPOConfig
) -> ModelOutputs:
    """Run actor, reference, critic and reward over a shared rollout. All ranks must call it together.

    Args:
        clock: gets the phases log_probs (actor and reference) and score (critic and reward).

    Raises:
        ValueError: the reward did not give one score per response.
    """

    def passes(part: Rollout) -> dict[str, Tensor]:
        with clock.phase(Phase.LOG_PROBS):
            log_probs, entropy = models.log_probs_and_entropy(part)
            outputs = {
                "old_log_probs": log_probs,
                "ref_log_probs": models.reference_log_probs(part),
                "entropy": entropy,
            }
        if models.critic is not None:
            with clock.phase(Phase.SCORE):
                outputs["values"] = models.values(part)
        return outputs

    with evaluating(models):
        outputs = compute_on_all_ranks(inputs.rollout, passes, config)
    with clock.phase(Phase.SCORE):
        scores = reward(inputs)
    if scores.shape != (len(inputs.rollout.tokens),):
        raise ValueError(
            f"the reward gave a tensor of shape {tuple(scores.shape)} for {len(inputs.rollout.tokens)} responses: it "
            "must give one number for each"
        )
    return ModelOutputs(
        outputs["old_log_probs"], outputs["ref_log_probs"], outputs["entropy"], outputs.get("values"), scores
    )


def to_scale(outputs: ModelOutputs, scale: ScoreScale) -> ModelOutputs:
    """The outputs of an iteration in the scale, which is measured on them where it is not known yet."""
    if scale.known:
        return outputs
    scale.measure(outputs.scores, with_critic=outputs.values is not None)
    return outputs if outputs.values is None else replace(outputs, values=scale.normalise(outputs.values))
