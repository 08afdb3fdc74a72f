"""Records what the sampler knew of each token when it drew it, whatever the way of generating."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.models.logprobs import length_mask
from common.models.token_sets import TokenSets
from step3_ppo.generation.rollout import Rollout
from step3_ppo.generation.sampling import Sampled, Sampling


class SamplerRecord:
    """The log-prob of each token in the distribution that it was drawn from, and with `Sampling.exact` the kept tokens.

    Sets of kept tokens are moved to CPU memory as they come.

    Args:
        responses: rows of the rollout.
        device: of the sampler.
    """

    def __init__(self, responses: int, sampling: Sampling, device: torch.device | str):
        self.log_probs = torch.zeros(responses, sampling.max_new_tokens, device=device)
        self.sets = [TokenSets.pack(torch.empty(0, 0, dtype=torch.bool))] if sampling.exact else []
        self.places = [torch.empty(0, dtype=torch.long)]  # of each set: row * columns + column

    def add(self, rows: Tensor, columns: Tensor, sampled: Sampled) -> None:
        """Record tokens that were drawn at the same time, as response tokens `columns` of `rows`, both (n,) long."""
        self.log_probs[rows, columns] = sampled.log_probs
        if sampled.kept is not None:
            self.places.append((rows * self.log_probs.shape[1] + columns).cpu())
            self.sets.append(TokenSets.pack(sampled.kept).to("cpu"))

    def attached_to(self, rollout: Rollout) -> Rollout:
        """The rollout, whose rows are those of the record, with what was recorded of its tokens."""
        lengths = rollout.response_lengths
        mask = length_mask(lengths, int(lengths.max()) if len(lengths) else 0)
        log_probs = self.log_probs[:, : mask.shape[1]].to(mask.device)
        kept = None
        if self.sets:
            order = torch.empty(self.log_probs.numel(), dtype=torch.long)
            places = torch.cat(self.places)
            order[places] = torch.arange(len(places))
            drawn = order.view(self.log_probs.shape)[:, : mask.shape[1]][mask.cpu()]
            kept = TokenSets.concat(self.sets).select(drawn).to(mask.device)
        return replace(rollout, sampling_log_probs=log_probs.masked_fill(~mask, 0), kept=kept)
