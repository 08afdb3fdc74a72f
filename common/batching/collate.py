"""Turns rows of ids into padded tensors.

Training batches are padded on the right, prompts for generation on the left, each batch to its own longest row. Masks
come from lengths and never from comparing tokens with the padding token, which may be part of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from typing import Any, Self

import torch
from datasets import Dataset
from torch import Tensor

from common.batching.sampler import MicroBatch


@dataclass(frozen=True)
class Batch:
    """Tensors of the rows of a micro-batch; a dataclass whose fields are all tensors."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


def unmasked(input_ids: Tensor) -> dict[str, Tensor]:
    """The inputs of a causal model for rows padded on the right, input_ids (B, L) long, without a mask.

    A token sees only those before it, so never the padding; outputs at padding positions are not used. Without a mask,
    attention takes its causal path, which skips the half of the scores that a mask would only hide.
    """
    return {"input_ids": input_ids}


def block_causal_mask(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to attention scores, so that a token sees only tokens of its own row up to itself.

    Args:
        rows: (B, L) long, the number of the row that each token belongs to. Padding counts as a row, so that every
            position sees something.

    Returns:
        (B, 1, L, L): 0 where a token is visible, else the lowest number of `dtype`.
    """
    visible = (rows[:, :, None] == rows[:, None, :]).tril()[:, None]
    return torch.zeros(visible.shape, dtype=dtype, device=rows.device).masked_fill(~visible, torch.finfo(dtype).min)


@dataclass(frozen=True)
class TokenBatch(Batch):
    """B sequences of up to L tokens, padded on the right.

    Attributes:
        input_ids, attention_mask: (B, L) long.
        loss_mask: (B, L) bool, True where the token at that position is a target. Never at position 0, which
            nothing predicts, and nowhere in a filler.
        lengths: (B,) long, tokens of each row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    lengths: Tensor

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs of a causal language model, see `unmasked`."""
        return unmasked(self.input_ids)


@dataclass(frozen=True)
class PackedBatch(Batch):
    """B sequences of up to L tokens, each of several rows one after another, padded on the right.

    Attributes:
        input_ids: (B, L) long.
        position_ids: (B, L) long, counted from each row's first token.
        rows: (B, L) long, a number for every row; 0 in the padding.
        loss_mask: as in `TokenBatch`; no row's first token is a target.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    loss_mask: Tensor

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs of a causal language model that computes in `dtype`.

        Both mask and positions are given: OPT would count positions through all rows by the mask, and other models
        derive no mask from positions.
        """
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": block_causal_mask(self.rows, dtype),
        }

    def flat(self) -> FlatBatch:
        """The same rows without padding, in one sequence."""
        real = self.rows > 0
        return FlatBatch(*(tensor[real][None] for tensor in (self.input_ids, self.position_ids, self.loss_mask)))


@dataclass(frozen=True)
class FlatBatch(Batch):
    """All rows of a micro-batch, N tokens, one after another in one sequence, for attention of variable length.

    Attributes:
        input_ids, position_ids, loss_mask: (1, N), as in `PackedBatch`.
    """

    input_ids: Tensor
    position_ids: Tensor
    loss_mask: Tensor

    def inputs(self, dtype: torch.dtype) -> dict[str, Any]:
        """The inputs of a causal language model: where rows begin and end, as flash-attention needs it, and no mask."""
        starts = (self.position_ids[0] == 0).nonzero()[:, 0]
        ends = torch.cat([starts[1:], starts.new_tensor([self.input_ids.shape[1]])])
        bounds, longest = torch.cat([starts[:1], ends]).int(), int((ends - starts).max())
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


@dataclass(frozen=True)
class PairBatch(Batch):
    """B comparisons as 2B sequences, padded on the right: rows 0..B-1 end in the chosen response, the rest in
    the rejected one, in the same order.

    Attributes:
        input_ids, attention_mask: (2B, L) long.
        lengths: (2B,) long, tokens of prompt and response.
        prompt_lengths: (2B,) long, those of the prompt alone.
        real: (B,) bool, False for a filler.
        margins: (B,) float, the margins that the rows have; 0 in data without margins.
    """

    input_ids: Tensor
    attention_mask: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    real: Tensor
    margins: Tensor


@dataclass(frozen=True)
class PromptBatch(Batch):
    """B prompts of up to P tokens, padded on the left.

    Attributes:
        input_ids, attention_mask: (B, P) long.
        lengths: (B,) long.
        prompt_index: (B,) long, row number in the data set.
        real: (B,) bool, False for a filler.
    """

    input_ids: Tensor
    attention_mask: Tensor
    lengths: Tensor
    prompt_index: Tensor
    real: Tensor

    def select(self, rows: Tensor) -> PromptBatch:
        """The rows with these indices, or where a (B,) bool is True; the padding is kept."""
        return self._each(lambda tensor: tensor[rows])

    def split(self, rows: int) -> list[PromptBatch]:
        """Batches of `rows` rows, the last of those that are left; each is padded only to its own longest row."""
        parts = [self._each(lambda tensor: tensor[start : start + rows]) for start in range(0, len(self.lengths), rows)]
        return [
            replace(
                part,
                input_ids=part.input_ids[:, -int(part.lengths.max()) :],
                attention_mask=part.attention_mask[:, -int(part.lengths.max()) :],
            )
            for part in parts
        ]


def collate_demonstrations(
    dataset: Dataset, micro_batch: MicroBatch, pad_id: int, train_on_prompt: bool = False
) -> TokenBatch | PackedBatch:
    """Prompt and response of each row, packed if the micro-batch is.

    The targets are the response with its end token, and with `train_on_prompt` the prompt too.
    """
    rows = dataset[list(micro_batch.indices)]
    prompts = [0 if train_on_prompt else len(prompt) for prompt in rows["prompt_ids"]]
    joined = [prompt + response for prompt, response in zip(rows["prompt_ids"], rows["response_ids"])]
    if micro_batch.packs:
        return _packed_batch(joined, prompts, micro_batch, pad_id)
    return _token_batch(joined, prompts, micro_batch.real, pad_id)


def collate_texts(dataset: Dataset, micro_batch: MicroBatch, pad_id: int) -> TokenBatch:
    """Plain text; every token is a target."""
    texts = list(dataset[list(micro_batch.indices)]["input_ids"])
    return _token_batch(texts, [0] * len(texts), micro_batch.real, pad_id)


def collate_comparisons(dataset: Dataset, micro_batch: MicroBatch, pad_id: int) -> PairBatch:
    """Each row's prompt with its chosen and with its rejected response."""
    rows = dataset[list(micro_batch.indices)]
    joined = [
        prompt + response
        for column in ("chosen_ids", "rejected_ids")
        for prompt, response in zip(rows["prompt_ids"], rows[column])
    ]
    prompt_lengths = torch.tensor([len(prompt) for prompt in rows["prompt_ids"]] * 2)
    margins = torch.tensor(rows["margin"]) if "margin" in dataset.column_names else torch.zeros(len(micro_batch.real))
    return PairBatch(*_padded(joined, pad_id), prompt_lengths, torch.tensor(micro_batch.real), margins)


def collate_responses(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each prompt with its response, padded on the right: ids (N, L), and the tokens of both and of the prompt, (N,)
    long."""
    input_ids, _, lengths = _padded([prompt + response for prompt, response in zip(prompts, responses)], pad_id)
    return input_ids, lengths, torch.tensor([len(prompt) for prompt in prompts])


def collate_prompts(dataset: Dataset, micro_batch: MicroBatch, pad_id: int) -> PromptBatch:
    """Prompts ready to be continued."""
    prompts = list(dataset[list(micro_batch.indices)]["prompt_ids"])
    return PromptBatch(
        *_padded(prompts, pad_id, left=True),
        prompt_index=torch.tensor(micro_batch.indices),
        real=torch.tensor(micro_batch.real),
    )


def _token_batch(
    rows: Sequence[list[int]], prompt_lengths: Sequence[int], real: Sequence[bool], pad_id: int
) -> TokenBatch:
    input_ids, attention_mask, lengths = _padded(rows, pad_id)
    position = torch.arange(input_ids.shape[1])
    first_target = torch.tensor(prompt_lengths).clamp(min=1)[:, None]
    loss_mask = (position >= first_target) & (position < lengths[:, None]) & torch.tensor(real)[:, None]
    return TokenBatch(input_ids, attention_mask, loss_mask, lengths)


def _packed_batch(
    rows: Sequence[list[int]], prompt_lengths: Sequence[int], micro_batch: MicroBatch, pad_id: int
) -> PackedBatch:
    def joined(of_rows: Iterable[Sequence], padding: int) -> Tensor:
        remaining = iter(of_rows)
        return _padded([list(chain.from_iterable(islice(remaining, pack))) for pack in micro_batch.packs], padding)[0]

    targets = [
        [real and position >= max(prompt, 1) for position in range(len(row))]
        for row, prompt, real in zip(rows, prompt_lengths, micro_batch.real)
    ]
    numbers = [[number] * len(row) for number, row in enumerate(rows, start=1)]
    return PackedBatch(
        joined(rows, pad_id), joined([range(len(row)) for row in rows], 0), joined(numbers, 0), joined(targets, False)
    )


def _padded(rows: Sequence[list[int]], pad_id: int, left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, L), attention mask (B, L) and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    position = torch.arange(width)
    present = position >= width - lengths[:, None] if left else position < lengths[:, None]
    input_ids = torch.full((len(rows), width), pad_id)
    input_ids[present] = torch.tensor([token for row in rows for token in row])
    return input_ids, present.long(), lengths
