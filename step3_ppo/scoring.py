"""Computes the outputs of the models and the reward for a rollout, before the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from common.config.option import Phase
from common.errors import UserError
from common.runtime.distributed import gather_objects
from common.training.timing import PhaseClock
from step3_ppo.calibration import ScoreScale
from step3_ppo.combined import CombinedReward, RewardScores
from step3_ppo.config import PPOConfig
from step3_ppo.generation.rollout import Rollout, Rows, concat_rows
from step3_ppo.models import PPOModels, evaluating
from step3_ppo.reward import Reward, RewardInputs
from step3_ppo.sharing import compute_on_all_ranks


@dataclass(frozen=True)
class ModelOutputs:
    """The models' outputs for a rollout, row by row, on the CPU of every rank."""

    old_log_probs: Tensor  # (B, R) nats, of the actor
    ref_log_probs: Tensor | None  # (B, R) nats, of the reference; None without one
    entropy: Tensor  # (B, R) nats, of the actor's next-token distribution
    values: Tensor | None  # (B, R) normalised score units, of the critic; None without one
    scores: Tensor  # (B,) raw scores of the reward; of --reward the weighted sum of these
    by_reward: RewardScores | None = None  # each of --reward by itself

    def log_ratio(self) -> Tensor | None:
        """(B, R) log-ratio of actor to reference, in nats; None without a reference."""
        return None if self.ref_log_probs is None else self.old_log_probs - self.ref_log_probs

    def response_kl(self) -> Tensor | None:
        """(B,) log-ratio summed over each response: the k1 estimate of its KL, in nats; None without a reference."""
        log_ratio = self.log_ratio()
        return None if log_ratio is None else log_ratio.sum(1)

    def scores_to_compare(self) -> Tensor:
        """What two responses to a prompt differ in: (B,) raw scores or, of --reward, (B, 2 K): those of each, and
        whether it failed."""
        if self.by_reward is None:
            return self.scores
        return torch.cat([self.by_reward.raw, self.by_reward.failed.float()], 1)

    def select(self, rows: Rows, width: int) -> ModelOutputs:
        """These rows (N,) long, in this order, for responses of at most `width` tokens."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        chosen = {name: tensor[rows] for name, tensor in self._tensors().items()}
        return replace(
            self,
            by_reward=None if self.by_reward is None else self.by_reward.select(rows),
            **{name: tensor[:, :width] if tensor.dim() > 1 else tensor for name, tensor in chosen.items()},
        )

    @staticmethod
    def concat(parts: Sequence[ModelOutputs]) -> ModelOutputs:
        """All rows of `parts`, padded with 0 to the widest."""
        names = parts[0]._tensors()
        by_reward = [part.by_reward for part in parts if part.by_reward is not None]
        return replace(
            parts[0],
            by_reward=RewardScores.concat(by_reward) if by_reward else None,
            **{name: concat_rows([getattr(part, name) for part in parts]) for name in names},
        )

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that there are not."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@torch.no_grad()
def score_rollout(
    models: PPOModels, reward: Reward | CombinedReward, inputs: RewardInputs, clock: PhaseClock, config: PPOConfig
) -> ModelOutputs:
    """Run actor, reference, critic and reward over a shared rollout. All ranks must call it together.

    Args:
        clock: gets the phases log_probs (actor and reference) and score (critic and reward).

    Raises:
        UserError: as of `check_scores`.
        Diverged: as of `CombinedReward.score`.
    """

    def passes(part: Rollout) -> dict[str, Tensor]:
        with clock.phase(Phase.LOG_PROBS):
            log_probs, entropy = models.log_probs_and_entropy(part)
            outputs = {"old_log_probs": log_probs, "entropy": entropy}
            if config.has_reference:
                outputs["ref_log_probs"] = models.reference_log_probs(part)
        if models.critic is not None:
            with clock.phase(Phase.SCORE):
                outputs["values"] = models.values(part)
        return outputs

    with evaluating(models):
        outputs = compute_on_all_ranks(inputs.rollout, passes, config)
    by_reward = None
    with clock.phase(Phase.SCORE):
        if isinstance(reward, CombinedReward):
            by_reward = reward.score(inputs)
            scores = by_reward.total
        else:
            scores = reward(inputs)
            check_scores(scores, len(inputs.rollout.tokens), reward)
    passed = (outputs["old_log_probs"], outputs.get("ref_log_probs"), outputs["entropy"], outputs.get("values"))
    return ModelOutputs(*passed, scores, by_reward)


def check_scores(scores: Tensor, responses: int, reward: Reward) -> None:
    """Check that a reward keeps to its protocol. All ranks must call it together.

    Raises:
        UserError: on all ranks alike, if on one of them it is no tensor with one score per response, or if they have
            different scores.
    """
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    is_tensor = isinstance(scores, Tensor)  # a function of the user's own may return anything
    on_ranks: list[Any] = gather_objects(scores.detach().float().cpu() if is_tensor else type(scores).__name__)
    for found in on_ranks:
        if isinstance(found, str) or found.shape != (responses,):
            what = f"a {found}" if isinstance(found, str) else f"a tensor of shape {tuple(found.shape)}"
            raise UserError(
                f"the reward {name} gave {what} for {responses} responses: it must give a torch tensor with one number "
                f"for each, of shape ({responses},)"
            )
    for number, found in enumerate(on_ranks):  # tensors, all of them
        if not torch.allclose(found, on_ranks[0], rtol=0, atol=0, equal_nan=True):
            raise UserError(
                f"the reward {name} gave other scores on rank {number} than on rank 0 for the same responses: every "
                "rank must return the same, so compute them alike, or on one rank and gather them"
            )


def observe(reward: object, scale: ScoreScale, outputs: ModelOutputs) -> bool:
    """Whether the scales of all scores are known. Those that are not will be measured in the first iteration, with
    these outputs of an evaluation before it."""
    if isinstance(reward, CombinedReward) and outputs.by_reward is not None:
        return reward.observe(outputs.by_reward)
    if not scale.known:
        scale.observe(outputs.scores)
    return scale.known


def to_scale(outputs: ModelOutputs, scale: ScoreScale, reward: object = None) -> ModelOutputs:
    """The outputs of an iteration on the scale of the critic's values, and of the scores.

    Scales are measured on them where they are not known yet, or change with every iteration.

    Args:
        scale: of the values, and of the scores where `reward` is a single one.
        reward: has scales of its own if it is combined of several; that of the values may be among them.
    """
    before, with_critic = scale.calibration, outputs.values is not None
    if isinstance(reward, CombinedReward) and outputs.by_reward is not None:
        reward.measure(outputs.by_reward, scale if with_critic else None)
    elif not (scale.known and scale.fixed):
        scale.measure(outputs.scores, with_critic)
    if outputs.values is None or scale.calibration == before:
        return outputs
    values = outputs.values if before is None else outputs.values * before.std + before.mean
    return replace(outputs, values=scale.normalise(values))
