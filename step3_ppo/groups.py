"""Finds the groups of responses that all have the same score, and replaces them by those to further prompts.

A group is all responses to one prompt. Where they all have the same score, estimators that compare them give the
advantage 0 (but for the KL), and the group only makes the batch smaller. Dynamic sampling leaves such groups out and
rolls out further prompts until the batch is full. (DAPO, arXiv:2503.14476, eq. 11)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.batching.sampler import MicroBatch, evaluation_batches
from step3_ppo.config import PPOConfig
from step3_ppo.generation.rollout import Rollout, Rows
from step3_ppo.scoring import ModelOutputs

# Scores this close are equal: absolutely, or relative to the larger one where that is above 1.
TOLERANCE = 1e-6
# Ends the key of the order of prompts. Numpy takes missing words of a key for 0, and the keys of epochs are shorter.
_REFILL = 1


@dataclass(frozen=True)
class Responses:
    """B responses with what the models and the reward say of them, row by row."""

    rollout: Rollout
    outputs: ModelOutputs

    def select(self, rows: Rows) -> Responses:
        """These rows (at least one), in this order, trimmed to the longest response."""
        rollout = self.rollout.select(rows)
        return Responses(rollout, self.outputs.select(rows, rollout.response_mask.shape[1]))

    @staticmethod
    def concat(parts: Sequence[Responses]) -> Responses:
        """All rows of `parts`, padded to the widest."""
        return Responses(
            Rollout.concat([part.rollout for part in parts]), ModelOutputs.concat([part.outputs for part in parts])
        )


def in_equal_group(rollout: Rollout, scores: Tensor) -> Tensor:
    """(B,) bool: whether all responses to the same prompt have the same scores, or are the same response.

    Args:
        scores: (B,) raw, or (B, K) of K rewards, each of which must be equal: a sum of raw scores may be equal where
            that of the normalised ones is not.
    """
    _, group = rollout.prompt_index.unique(return_inverse=True)
    scores = scores.view(len(scores), -1)[first_of_its_kind(rollout)]
    columns = group[:, None].expand(scores.shape)
    extremes = torch.zeros_like(scores)
    highest = extremes.scatter_reduce(0, columns, scores, "amax", include_self=False)[group]
    lowest = extremes.scatter_reduce(0, columns, scores, "amin", include_self=False)[group]
    return (highest - lowest <= TOLERANCE * torch.maximum(highest.abs(), lowest.abs()).clamp_min(1)).all(1)


def first_of_its_kind(rollout: Rollout) -> Tensor:
    """(B,) long: for each row the first row of the same prompt with the same tokens. A reward model's scores of such
    rows are the same but for rounding, which differs from batch to batch and is coarse in bf16.

    Two prompts may have the same text, where their rows have other columns by which a reward judges.
    """
    tokens = rollout.tokens.masked_fill(rollout.attention_mask == 0, -1)
    _, kind = torch.cat([rollout.prompt_index[:, None], tokens], 1).unique(dim=0, return_inverse=True)
    rows = torch.arange(len(kind))
    return torch.full_like(kind, len(kind)).scatter_reduce(0, kind, rows, "amin")[kind]


def equal_fraction(rollout: Rollout, scores: Tensor) -> float:
    """The share of prompts to which all responses have the same scores, (B,) or (B, K) as of `in_equal_group`."""
    groups = rollout.prompt_index
    return len(groups[in_equal_group(rollout, scores)].unique()) / len(groups.unique())


def refilled(
    first: Responses,
    respond: Callable[[list[int]], Responses],
    prompts: int,
    iteration: int,
    config: PPOConfig,
) -> tuple[Responses, Tensor]:
    """Dynamic sampling: responses to further prompts in the place of groups whose scores are all equal.

    It is a function of its arguments alone, so that a resumed run, and one on other ranks, does the same.

    Args:
        first: all responses to the prompts of an iteration.
        respond: from rows of the data set to all responses to these prompts; called `config.max_refills` times at most.
        prompts: the number of rows of the data set.
        iteration: its number.

    Returns:
        All responses that were made; and the rows (N,) long that are learnt from: all responses of the unequal groups,
        as many groups as `first` has at most. Where the last refill has more of them, those that were drawn first.
    """
    wanted = len(first.rollout.prompt_index.unique())
    made, chosen = first, unequal_rows(first, wanted)
    for refill in range(config.max_refills):
        drawn = made.rollout.prompt_index.unique()
        found = len(made.rollout.prompt_index[chosen].unique())
        # As many as are missing, if as many of them are unequal as of those before, and never more than at first.
        number = min(wanted, -(-(wanted - found) * len(drawn) // max(found, 1)))
        further = refill_prompts(config.seed, iteration, refill, prompts, set(drawn.tolist()))[:number]
        if not further:
            break
        more = respond(further)
        made = Responses.concat([made, more.select(rows_of(more.rollout.prompt_index, further))])
        chosen = unequal_rows(made, wanted)
    return made, chosen


def unequal_rows(responses: Responses, groups: int) -> Tensor:
    """(N,) long: the rows of the first so many groups whose scores are not all equal."""
    prompt_index = responses.rollout.prompt_index
    rows = (~in_equal_group(responses.rollout, responses.outputs.scores_to_compare())).nonzero().squeeze(1)
    first = list(dict.fromkeys(prompt_index[rows].tolist()))[:groups]
    return rows[torch.isin(prompt_index[rows], torch.tensor(first, dtype=torch.long))]


def rows_of(prompt_index: Tensor, prompts: Sequence[int]) -> Tensor:
    """(N,) long: the rows of these prompts, prompt by prompt in this order."""
    return torch.cat([(prompt_index == prompt).nonzero().squeeze(1) for prompt in prompts])


def refill_prompts(seed: int, iteration: int, refill: int, prompts: int, used: Collection[int]) -> list[int]:
    """The rows of all prompts that are not `used`, in the random order of one refill of one iteration.

    A prompt is drawn once in an iteration at most: the random numbers of its responses are keyed by the iteration.
    """
    order = np.random.default_rng([seed, iteration, refill, _REFILL]).permutation(prompts)
    return [prompt for prompt in order.tolist() if prompt not in used]


def refill_batches(
    prompts: Sequence[int], lengths: Sequence[int], rows_per_batch: int, world_size: int, rank: int
) -> list[MicroBatch]:
    """This rank's micro-batches of the prompts of a refill: every one once over all ranks, and fillers.

    Args:
        prompts: rows of the data set.
        lengths: tokens of each of these prompts.
    """
    rows = min(rows_per_batch, -(-len(prompts) // world_size))
    return [
        MicroBatch(tuple(prompts[place] for place in batch.indices), batch.real)
        for batch in evaluation_batches(lengths, rows, world_size, rank)
    ]
