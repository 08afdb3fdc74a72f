"""The two batches of PPO: what the actor wrote, and what has been learnt about it.

B rows; L the width of the tokens; R the longest response of the batch, so that column t of a (B, R) tensor
belongs to response token t. Masks come from lengths alone: an end token that doubles as padding still counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from common.models.logprobs import length_mask

Rows = Tensor | Sequence[int]


@dataclass(frozen=True)
class Rollout:
    """Prompts and the responses written to them.

    A filler is a row that only keeps ranks in step (real = False): the models see it, and it counts nowhere.
    """

    tokens: Tensor  # (B, L) long: prompt and response joined without a gap, then padding of any valid id
    prompt_lengths: Tensor  # (B,) long, at least 1
    response_lengths: Tensor  # (B,) long, the end token included
    finished: Tensor  # (B,) bool: the response ended with the end token, and was not cut by length
    prompt_index: Tensor  # (B,) long: row of the prompt in its data set
    real: Tensor  # (B,) bool: False for fillers

    def __post_init__(self) -> None:
        rows = len(self.tokens)
        for field in fields(self)[1:]:
            if getattr(self, field.name).shape != (rows,):
                shape = tuple(getattr(self, field.name).shape)
                raise ValueError(f"Rollout.{field.name} has shape {shape}, but tokens has {rows} rows")
        if rows and int(self.prompt_lengths.min()) < 1:
            raise ValueError("Rollout.prompt_lengths: nothing predicts the response to an empty prompt")
        if rows and int(self.lengths.max()) > self.tokens.shape[1]:
            longest = int(self.lengths.max())
            raise ValueError(f"Rollout.tokens is {self.tokens.shape[1]} wide, its longest row {longest}")

    @cached_property
    def lengths(self) -> Tensor:
        """(B,) long: tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def attention_mask(self) -> Tensor:
        """(B, L) long: 1 on prompt and response. Fillers keep theirs, as models dislike empty rows."""
        return length_mask(self.lengths, self.tokens.shape[1]).long()

    @cached_property
    def response_mask(self) -> Tensor:
        """(B, R) bool: true on response tokens, the end token included; all False for fillers."""
        return length_mask(self.response_lengths, int(self.response_lengths.max())) & self.real[:, None]

    def select(self, rows: Rows, real: Tensor | Sequence[bool] | None = None) -> Rollout:
        """These rows, in this order, trimmed to the longest; `real` (same length) marks fillers."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.tokens.device)
        chosen = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        chosen["tokens"] = chosen["tokens"][:, : int(self.lengths[rows].max())]
        if real is not None:
            chosen["real"] = chosen["real"] & torch.as_tensor(real, dtype=torch.bool, device=rows.device)
        return Rollout(**chosen)

    @staticmethod
    def concat(parts: Sequence[Rollout]) -> Rollout:
        """All rows of `parts`, padded to the widest."""
        names = [field.name for field in fields(Rollout)]
        return Rollout(**{name: _concat([getattr(part, name) for part in parts]) for name in names})

    def to(self, device: torch.device | str) -> Rollout:
        return Rollout(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class Experience:
    """A rollout with all that its update needs, fixed before the update begins.

    The (B, R) tensors are float32; what they hold outside `response_mask` is never used.
    """

    rollout: Rollout
    old_log_probs: Tensor  # (B, R) nats, of the actor as it was before the update
    ref_log_probs: Tensor  # (B, R) nats, of the reference
    values: Tensor  # (B, R) of the critic as it was before the update
    advantages: Tensor  # (B, R) whitened if whitening is on
    returns: Tensor  # (B, R) targets of the critic, from the unwhitened advantages

    def __post_init__(self) -> None:
        responses = self.response_mask.shape
        for field in _aligned_fields():
            if getattr(self, field).shape != responses:
                shape = tuple(getattr(self, field).shape)
                raise ValueError(f"Experience.{field} has shape {shape}, its responses {tuple(responses)}")

    @property
    def response_mask(self) -> Tensor:
        """(B, R) bool: the tokens that every loss and statistic is taken over."""
        return self.rollout.response_mask

    def select(self, rows: Rows, real: Tensor | Sequence[bool] | None = None) -> Experience:
        """These rows, in this order, trimmed to the longest; `real` (same length) marks fillers."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.values.device)
        rollout = self.rollout.select(rows, real)
        width = rollout.response_mask.shape[1]
        aligned = {field: getattr(self, field)[rows, :width] for field in _aligned_fields()}
        return Experience(rollout, **aligned)

    def to(self, device: torch.device | str) -> Experience:
        return Experience(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def _aligned_fields() -> list[str]:
    return [field.name for field in fields(Experience) if field.name != "rollout"]


def _concat(tensors: Sequence[Tensor]) -> Tensor:
    """Joins (B_i,) tensors, or (B_i, W_i) ones padded with 0 on the right to the widest."""
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])
