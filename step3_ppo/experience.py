"""Defines the batch that PPO learns from: a rollout, and what the update needs to know about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from step3_ppo.generation.rollout import Rollout, Rows


@dataclass(frozen=True)
class Experience:
    """A rollout with all that its update needs, fixed before the update begins.

    The (B, R) tensors are float32; what they hold outside `response_mask` is never used.
    """

    rollout: Rollout
    old_log_probs: Tensor  # (B, R) nats, of the actor as it was before the update
    ref_log_probs: Tensor | None  # (B, R) nats, of the reference; None without one
    values: Tensor | None  # (B, R) of the critic as it was before the update; None without a critic
    advantages: Tensor  # (B, R) whitened if whitening is on
    returns: Tensor | None  # (B, R) targets of the critic, from the unwhitened advantages; None without a critic

    def __post_init__(self) -> None:
        responses = self.response_mask.shape
        for name, tensor in self._aligned().items():
            if tensor.shape != responses:
                raise ValueError(f"Experience.{name} has shape {tuple(tensor.shape)}, its responses {tuple(responses)}")
        if (self.values is None) != (self.returns is None):
            raise ValueError("Experience.values and returns: a critic has both, and without one there is neither")

    @property
    def response_mask(self) -> Tensor:
        """(B, R) bool: the tokens that every loss and statistic is taken over."""
        return self.rollout.response_mask

    def select(self, rows: Rows, real: Tensor | Sequence[bool] | None = None) -> Experience:
        """These rows, in this order, trimmed to the longest; `real` (same length) marks fillers."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.advantages.device)
        rollout = self.rollout.select(rows, real)
        width = rollout.response_mask.shape[1]
        return replace(
            self, rollout=rollout, **{name: tensor[rows, :width] for name, tensor in self._aligned().items()}
        )

    def to(self, device: torch.device | str) -> Experience:
        moved = {name: tensor.to(device) for name, tensor in self._aligned().items()}
        return replace(self, rollout=self.rollout.to(device), **moved)

    def _aligned(self) -> dict[str, Tensor]:
        """The (B, R) tensors by name, without those of a critic or a reference that is not there."""
        names = [field.name for field in fields(self) if field.name != "rollout"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
