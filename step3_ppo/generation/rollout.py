"""Defines the batch that generation returns: prompts, and the responses that the actor generated.

B rows; L the width of the tokens; R the longest response of the batch, so that column t of a (B, R) tensor
belongs to response token t; N the response tokens of all rows. Masks come from lengths alone: an end token that doubles
as padding still counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.batching.collate import PromptBatch
from common.models.logprobs import length_mask
from common.models.token_sets import TokenSets, places_within
from common.runtime.distributed import rank

Rows = Tensor | Sequence[int]


@dataclass(frozen=True)
class Rollout:
    """Prompts and the responses generated to them.

    A filler (real = False) only gives all ranks equally many rows: the models process it, and nothing counts it.
    """

    tokens: Tensor  # (B, L) long: prompt and response joined without a gap, then padding of any valid id
    prompt_lengths: Tensor  # (B,) long, at least 1
    response_lengths: Tensor  # (B,) long, the end token included
    finished: Tensor  # (B,) bool: the response ended with the end token, and was not cut by length
    prompt_index: Tensor  # (B,) long: row of the prompt in its data set
    real: Tensor  # (B,) bool: False for fillers
    made_by: Tensor  # (B,) long: the rank that generated the response
    # What the sampler recorded; None where it recorded nothing.
    sampling_log_probs: Tensor | None = None  # (B, R) float32 nats, in the distribution that the token was drawn from
    kept: TokenSets | None = None  # N sets, row by row: the tokens that could be drawn; None unless `Sampling.exact`

    def __post_init__(self) -> None:
        rows = len(self.tokens)
        for name in _OF_ROWS:
            if getattr(self, name).shape != (rows,):
                shape = tuple(getattr(self, name).shape)
                raise ValueError(f"Rollout.{name} has shape {shape}, but tokens has {rows} rows")
        if rows and int(self.prompt_lengths.min()) < 1:
            raise ValueError("Rollout.prompt_lengths: nothing predicts the response to an empty prompt")
        if rows and int(self.lengths.max()) > self.tokens.shape[1]:
            longest = int(self.lengths.max())
            raise ValueError(f"Rollout.tokens is {self.tokens.shape[1]} wide, its longest row {longest}")
        responses = rows, int(self.response_lengths.max()) if rows else 0
        if self.sampling_log_probs is not None and self.sampling_log_probs.shape != responses:
            shape = tuple(self.sampling_log_probs.shape)
            raise ValueError(f"Rollout.sampling_log_probs has shape {shape}, its responses {responses}")
        if self.kept is not None and len(self.kept) != int(self.response_lengths.sum()):
            raise ValueError(f"Rollout.kept has {len(self.kept)} sets for {int(self.response_lengths.sum())} tokens")

    @cached_property
    def lengths(self) -> Tensor:
        """(B,) long: tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    @cached_property
    def attention_mask(self) -> Tensor:
        """(B, L) long: 1 on prompt and response. Also 1 on fillers, because empty rows give NaN in some models."""
        return length_mask(self.lengths, self.tokens.shape[1]).long()

    @cached_property
    def response_mask(self) -> Tensor:
        """(B, R) bool: true on response tokens, the end token included; all False for fillers."""
        return length_mask(self.response_lengths, int(self.response_lengths.max())) & self.real[:, None]

    def select(self, rows: Rows, real: Tensor | Sequence[bool] | None = None) -> Rollout:
        """These rows, in this order, trimmed to the longest; `real` (same length) marks fillers."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.tokens.device)
        chosen = {name: getattr(self, name)[rows] for name in _OF_ROWS}
        chosen["tokens"] = self.tokens[rows, : int(self.lengths[rows].max())]
        if real is not None:
            chosen["real"] = chosen["real"] & torch.as_tensor(real, dtype=torch.bool, device=rows.device)
        if self.sampling_log_probs is not None:
            chosen["sampling_log_probs"] = self.sampling_log_probs[rows, : int(self.response_lengths[rows].max())]
        kept = None if self.kept is None else self.kept.select(places_within(self.response_lengths, rows))
        return Rollout(**chosen, kept=kept)

    @staticmethod
    def concat(parts: Sequence[Rollout]) -> Rollout:
        """All rows of `parts`, padded to the widest."""
        names = [field.name for field in fields(Rollout)]
        return Rollout(**{name: concat_rows([getattr(part, name) for part in parts]) for name in names})

    def to(self, device: torch.device | str) -> Rollout:
        each = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in each.items() if value is not None})


_OF_ROWS = ("prompt_lengths", "response_lengths", "finished", "prompt_index", "real", "made_by")  # the (B,) tensors


def join_responses(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[list[int]],
    prompt_index: Tensor,
    end_ids: Sequence[int],
    pad_id: int,
) -> Rollout:
    """Prompts and the responses that this rank generated as a rollout, on the CPU. prompt_index (B,) long."""
    rows = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses)]
    tokens = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
        if rows
        else torch.empty(0, 1, dtype=torch.long)
    )
    return Rollout(
        tokens,
        torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long),
        torch.tensor([len(response) for response in responses], dtype=torch.long),
        torch.tensor([response[-1] in end_ids for response in responses], dtype=torch.bool),
        prompt_index,
        torch.ones(len(rows), dtype=torch.bool),
        torch.full_like(prompt_index, rank()),
    )


def to_rollout(sequences: Tensor, prompts: PromptBatch, end_ids: Sequence[int], pad_id: int, limits: Tensor) -> Rollout:
    """Cut responses, generated by this rank, at their first end token and join them to their prompts without a gap.

    Args:
        sequences: (B, P + T) left-padded prompts followed by responses; what follows an end token is ignored.
        limits: (B,) tokens that each response may have.
    """
    width = prompts.input_ids.shape[1]
    responses = sequences[:, width : width + int(limits.max())]
    columns = torch.arange(responses.shape[1], device=sequences.device)
    ends = torch.isin(responses, responses.new_tensor(end_ids)) & (columns < limits[:, None])
    finished = ends.any(1)
    response_lengths = torch.where(finished, ends.int().argmax(1) + 1, limits.clamp_max(responses.shape[1]))
    # Rolling each row left by its padding moves the padding behind the response.
    columns = torch.arange(sequences.shape[1], device=sequences.device)
    shift = (width - prompts.lengths).unsqueeze(1)
    tokens = sequences.gather(1, (columns + shift) % sequences.shape[1])
    lengths = prompts.lengths + response_lengths
    tokens = tokens.masked_fill(columns >= lengths.unsqueeze(1), pad_id)[:, : int(lengths.max())]
    made_by = torch.full_like(prompts.lengths, rank())
    return Rollout(tokens, prompts.lengths, response_lengths, finished, prompts.prompt_index, prompts.real, made_by)


def concat_rows(tensors: Sequence[Any]) -> Any:
    """Join (B_i,) tensors, (B_i, W_i) ones padded with 0 on the right to the widest, or sets; None if one is None."""
    if any(tensor is None for tensor in tensors):
        return None
    if isinstance(tensors[0], TokenSets):
        return TokenSets.concat(tensors)
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])
