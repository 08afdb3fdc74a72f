"""The standard way, that the product is compared with: batches of a fixed size in the order given, padded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)

from common.batching.collate import PromptBatch
from common.batching.sampler import MicroBatch
from common.models.engine import Engine
from common.runtime.distributed import gather_objects, rank, world_size
from step3_ppo.generation.sampling import Sampling, sample_tokens


def fixed_micro_batches(micro_batches: Iterable[MicroBatch], rows_per_batch: int) -> list[MicroBatch]:
    """The same rows over all ranks in micro-batches of `rows_per_batch`, as many on every rank; the order is that of
    the data."""
    mine = [index for batch in micro_batches for index, real in zip(batch.indices, batch.real) if real]
    rows = sorted(index for part in gather_objects(mine) for index in part)
    return dealt(rows, rows_per_batch)


def dealt(rows: Sequence[int], rows_per_batch: int) -> list[MicroBatch]:
    """This rank's share of the rows, in turns; the last batch is filled with rows that count nothing."""
    mine = list(rows[rank() :: world_size()])
    count = -(-len(rows) // (rows_per_batch * world_size()))
    fillers = count * rows_per_batch - len(mine)
    real = [True] * len(mine) + [False] * fillers
    mine += [rows[-1]] * fillers
    return [
        MicroBatch(tuple(mine[start : start + rows_per_batch]), tuple(real[start : start + rows_per_batch]))
        for start in range(0, len(mine), rows_per_batch)
    ]


class LongTail(Sampling):
    """Imposed lengths with the long tail of real ones: exponential, cut at the limit, a third of it in the mean."""

    def lengths_at(self, uniform: Tensor) -> Tensor:
        return (-0.354 * self.max_new_tokens * (-uniform).log1p()).long().clamp_max(self.max_new_tokens - 1) + 1


def padded_to(tensor: Tensor, width: int, value: int | bool) -> Tensor:
    """(B, L) -> (B, width), filled on the right."""
    return F.pad(tensor, (0, width - tensor.shape[1]), value=value)


def cached_generate(
    engine: Engine,
    prompts: PromptBatch,
    sampling: Sampling,
    uniform: Tensor,
    lengths: Tensor,
    *,
    end_id: int,
    pad_id: int,
) -> list[list[int]]:
    """Responses of the imposed lengths by transformers' `generate` with a cache, stopping when all have ended.

    Under ZeRO-3 the ranks stay in step, and DeepSpeed gathers the weights for every token.

    Args:
        prompts: padded on the left.
        uniform: (B, T) the random number behind each token.
        lengths: (B,) tokens of each response.
    """
    width = prompts.input_ids.shape[1]
    there = prompts.input_ids.device
    chosen = _Chosen(width, uniform.to(there), lengths.to(there), sampling, end_id)
    engine.eval()
    sequences = engine.module.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=end_id,
            pad_token_id=pad_id,
        ),
        logits_processor=LogitsProcessorList([chosen]),
        synced_gpus=engine.zero_optimization_partition_weights() and world_size() > 1,
    )
    engine.train()
    return [
        [*row[width : width + length - 1].tolist(), last]
        for row, length, last in zip(sequences.cpu(), lengths.tolist(), chosen.last.tolist())
    ]


class _Chosen(LogitsProcessor):
    """Draws each token with the random number that the product draws it with, and ends each response at its length:
    there `generate` gets the end token, and the token drawn is kept as `last`."""

    def __init__(self, width: int, uniform: Tensor, lengths: Tensor, sampling: Sampling, end_id: int):
        self.width, self.uniform, self.lengths = width, uniform, lengths
        self.sampling, self.end_id = sampling, end_id
        self.last = torch.full_like(self.lengths, end_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.width
        scores = scores.clone()
        scores[:, self.end_id] = -torch.inf
        tokens = sample_tokens(scores, self.uniform[:, position], self.sampling).tokens
        self.last = torch.where(self.lengths == position + 1, tokens, self.last)
        tokens = tokens.masked_fill(position + 1 >= self.lengths, self.end_id)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@torch.no_grad()
def generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[int], *, at_a_time: int, pad_id: int
) -> list[list[int]]:
    """Greedy responses of the imposed lengths by transformers' own continuous batching, as `generate_batch` does it.

    Args:
        model: of transformers, with a language model's head; its two base classes make no common type.
    """
    config = GenerationConfig(do_sample=False, max_new_tokens=max(lengths), eos_token_id=-1, pad_token_id=pad_id)
    room = ContinuousBatchingConfig(max_requests_per_batch=at_a_time, num_blocks=4 * at_a_time, max_batch_tokens=512)
    attention = model.config._attn_implementation
    found: dict[str, list[int]] = {}
    try:
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=room
        ) as manager:
            names = [
                manager.add_request(list(prompt), max_new_tokens=length) for prompt, length in zip(prompts, lengths)
            ]
            while len(found) < len(names) and manager.is_running():
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[result.request_id] = result.generated_tokens
    finally:
        model.set_attn_implementation(attention)
    return [found[name] for name in names]


def same_responses(first: Sequence[list[int]], other: Sequence[list[int]], exact: bool) -> dict[str, float]:
    """Compare responses of this rank.

    Raises AssertionError where lengths differ, or with `exact` any token.

    Returns:
        The share of all ranks' responses that are equal to the last token.
    """
    if [len(row) for row in first] != [len(row) for row in other]:
        raise AssertionError("the variants disagree: responses have other lengths")
    same = [row == twin for row, twin in zip(first, other)]
    if exact and not all(same):
        raise AssertionError(f"the variants disagree: {same.count(False)} of {len(same)} responses differ")
    whole = [found for part in gather_objects(same) for found in part]
    return {"equal_responses": whole.count(True) / len(whole)}
