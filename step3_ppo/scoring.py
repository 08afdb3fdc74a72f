"""What the four models say of a rollout, the passes divided between ranks and the results shared by all."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from common.batching.sampler import evaluation_batches, token_budget_batches
from common.runtime.distributed import device, gather_objects, rank, world_size
from common.training.timing import PhaseClock
from step3_ppo.experience import Rollout
from step3_ppo.models import PPOModels, evaluating


@dataclass(frozen=True)
class ModelOutputs:
    """Read off the models before the update; row b belongs to row b of the rollout. On the CPU of every rank."""

    old_log_probs: Tensor  # (B, R) nats, of the actor
    ref_log_probs: Tensor  # (B, R) nats, of the reference
    entropy: Tensor  # (B, R) nats, of the actor's next-token distribution
    values: Tensor  # (B, R) normalised score units
    scores: Tensor  # (B,) raw scores of the reward model

    def response_kl(self) -> Tensor:
        """(B,) log-ratio of actor to reference summed over each response: the k1 estimate of its KL, in nats."""
        return (self.old_log_probs - self.ref_log_probs).sum(1)


class RolloutAbandoned(Exception):
    """A rank was told to stop during the rollout; raised on all ranks alike. No weight has changed."""


def share_rollout(mine: Rollout | None) -> Rollout:
    """All ranks' responses on every rank, without fillers, in the order of their prompts in the data set.

    The result does not depend on how the prompts were dealt to ranks and batches.

    Raises:
        RolloutAbandoned: a rank gave None.
    """
    parts = gather_objects(mine and mine.to("cpu"))
    if None in parts:
        raise RolloutAbandoned
    rollout = Rollout.concat(parts)
    real = rollout.real.nonzero().squeeze(1)
    return rollout.select(real[rollout.prompt_index[real].argsort(stable=True)])


@torch.no_grad()
def score_rollout(
    models: PPOModels, rollout: Rollout, clock: PhaseClock, rows_per_batch: int, max_tokens: int = 0
) -> ModelOutputs:
    """Run actor, reference, critic and reward model over a shared rollout.

    Args:
        rollout: B responses, the same on every rank.
        clock: gets the phases log_probs (actor and reference) and score (critic and reward model).
        rows_per_batch: rows of one forward pass.
        max_tokens: if not 0, its padded tokens, of any number of rows.
    """
    lengths = rollout.lengths.tolist()
    batches = (
        token_budget_batches(lengths, max_tokens, world_size(), rank())
        if max_tokens
        else evaluation_batches(lengths, rows_per_batch, world_size(), rank())
    )
    mine = []
    with evaluating(models):
        for batch in batches:
            part = rollout.select(batch.indices).to(device())
            with clock.phase("log_probs"):
                log_probs, entropy = models.log_probs_and_entropy(part)
                reference = models.reference_log_probs(part)
            with clock.phase("score"):
                results = ModelOutputs(log_probs, reference, entropy, models.values(part), models.scores(part))
            mine.append((batch, [getattr(results, field.name).float().cpu() for field in fields(ModelOutputs)]))
    whole = [torch.zeros(rollout.response_mask.shape) for _ in range(4)] + [torch.zeros(len(rollout.tokens))]
    for batch, tensors in (item for items in gather_objects(mine) for item in items):
        rows = torch.tensor(batch.indices)[torch.tensor(batch.real)]
        for target, tensor in zip(whole, tensors):
            kept = tensor[torch.tensor(batch.real)]
            if target.dim() == 1:
                target[rows] = kept
            else:
                target[rows, : kept.shape[1]] = kept
    return ModelOutputs(*whole)
