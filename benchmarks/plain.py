"""Implements the baseline of the benchmarks: padded batches of a fixed size, in the order of the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList

from common.batching.collate import PromptBatch
from common.batching.sampler import MicroBatch
from common.runtime.distributed import gather_objects, rank, world_size
from step3_ppo.generation.sampling import Sampling, sample_tokens


def fixed_micro_batches(micro_batches: Iterable[MicroBatch], rows_per_batch: int) -> list[MicroBatch]:
    """The same rows over all ranks, in the order of the data, in micro-batches of `rows_per_batch`. Every rank has the
    same number of micro-batches."""
    mine = [index for batch in micro_batches for index, real in zip(batch.indices, batch.real) if real]
    rows = sorted(index for part in gather_objects(mine) for index in part)
    return share_of_rows(rows, rows_per_batch)


def share_of_rows(rows: Sequence[int], rows_per_batch: int) -> list[MicroBatch]:
    """This rank's rows, dealt in turns to the ranks; the last batch is filled up with filler rows."""
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
    """Imposes lengths with a long tail: exponential, cut at the limit, with a third of the limit as mean."""

    def lengths_at(self, uniform: Tensor) -> Tensor:
        return (-0.354 * self.max_new_tokens * (-uniform).log1p()).long().clamp_max(self.max_new_tokens - 1) + 1


def padded_to(tensor: Tensor, width: int, value: int | bool) -> Tensor:
    """(B, L) -> (B, width), filled on the right."""
    return F.pad(tensor, (0, width - tensor.shape[1]), value=value)


def cached_generate(
    engine, prompts: PromptBatch, sampling: Sampling, uniform: Tensor, lengths: Tensor, *, end_id: int, pad_id: int
) -> list[list[int]]:
    """Responses of the imposed lengths by transformers' `generate` with a cache, stopping when all have ended.

    Under ZeRO-3 all ranks generate equally many tokens, and DeepSpeed gathers the weights for every token.

    Args:
        prompts: padded on the left.
        uniform: (B, T) the random number behind each token.
        lengths: (B,) tokens of each response.
    """
    width = prompts.input_ids.shape[1]
    device = prompts.input_ids.device
    chosen = _Chosen(width, uniform.to(device), lengths.to(device), sampling, end_id)
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
    """Samples each token with the product's random number, and ends each response at its imposed length.

    At that length `generate` gets the end token, and the sampled token is stored in `last`.
    """

    def __init__(self, width: int, uniform: Tensor, lengths: Tensor, sampling: Sampling, end_id: int):
        self.width, self.uniform, self.lengths = width, uniform, lengths
        self.sampling, self.end_id = sampling, end_id
        self.last = torch.full_like(self.lengths, end_id)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.width
        scores = scores.clone()
        scores[:, self.end_id] = -torch.inf
        tokens = sample_tokens(scores, self.uniform[:, position], self.sampling)
        self.last = torch.where(position + 1 == self.lengths, tokens, self.last)
        tokens = tokens.masked_fill(position + 1 >= self.lengths, self.end_id)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@torch.no_grad()
def generate_batch(
    model, prompts: Sequence[Sequence[int]], lengths: Sequence[int], *, at_a_time: int, pad_id: int
) -> list[list[int]]:
    """Greedy responses of the imposed lengths, by the continuous batching of transformers."""
    config = GenerationConfig(do_sample=False, max_new_tokens=max(lengths), eos_token_id=-1, pad_token_id=pad_id)
    limits = ContinuousBatchingConfig(max_requests_per_batch=at_a_time, num_blocks=4 * at_a_time, max_batch_tokens=512)
    attention = model.config._attn_implementation
    responses: dict[str, list[int]] = {}
    try:
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=limits
        ) as manager:
            names = [
                manager.add_request(list(prompt), max_new_tokens=length) for prompt, length in zip(prompts, lengths)
            ]
            while len(responses) < len(names) and manager.is_running():
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    responses[result.request_id] = result.generated_tokens
    finally:
        model.set_attn_implementation(attention)
    return [responses[name] for name in names]


def same_responses(first: Sequence[list[int]], other: Sequence[list[int]], exact: bool) -> dict[str, float]:
    """Compare responses of this rank.

    Args:
        exact: require equal tokens too, not only equal lengths.

    Returns:
        The fraction of all ranks' responses that are equal in every token.

    Raises:
        AssertionError: the responses differ.
    """
    if [len(row) for row in first] != [len(row) for row in other]:
        raise AssertionError("the variants disagree: responses have other lengths")
    same = [row == twin for row, twin in zip(first, other)]
    if exact and not all(same):
        raise AssertionError(f"the variants disagree: {same.count(False)} of {len(same)} responses differ")
    equal_on_all_ranks = [equal for part in gather_objects(same) for equal in part]
    return {"equal_responses": equal_on_all_ranks.count(True) / len(equal_on_all_ranks)}
