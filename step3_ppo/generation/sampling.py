"""Samples tokens from logits.

Randomness is fixed before decoding: one uniform number per (seed, iteration, prompt, sample, position), turned into
a token by the inverse of the cumulative distribution. So a response depends on its prompt and the weights alone, not
on the rank, the batch or the slot it was decoded in, nor on what was decoded before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NO_TOKEN = -1  # stands for a token where the logits are not finite; it ends a response


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled; the same temperature is used for the log-probs that are trained on.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep the most probable k tokens; 0 keeps all.
        min_new_tokens: no end token is possible before so many tokens.
        max_new_tokens: a response that has not ended by then is cut.
        draw_lengths: each response has exactly a length drawn uniformly between these two limits.
        samples_per_prompt: responses to each prompt.
        exact: where the sampler keeps only some tokens, the policy that is trained is renormalised on them too.
    """

    temperature: float
    top_p: float
    top_k: int
    min_new_tokens: int
    max_new_tokens: int
    draw_lengths: bool = False
    samples_per_prompt: int = 1
    exact: bool = False

    @property
    def truncated(self) -> bool:
        """True if the sampler keeps only some of the policy's tokens, at some positions at least."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_new_tokens > 0 or self.draw_lengths

    def lengths_at(self, uniform: Tensor) -> Tensor:
        """Lengths drawn with uniform numbers in [0, 1), of any shape."""
        shortest = max(1, self.min_new_tokens)
        return shortest + (uniform * (self.max_new_tokens - shortest + 1)).long()


def without_ends(logits: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """Logits (B, V) with those of the tokens `ends` (E,) at minus infinity in `rows` (B,) bool."""
    held_back = logits[:, ends].masked_fill(rows[:, None], -torch.inf)
    return logits.index_copy(1, ends, held_back)


def uniforms(seed: int, iteration: int, prompt_index: Tensor, positions: int, sample: int = 0) -> Tensor:
    """The uniform numbers that each response is drawn with.

    Args:
        prompt_index: (B,) row of each prompt in its data set.
        positions: how many response tokens may be needed.
        sample: number of the response, where a prompt gets several.

    Returns:
        (B, positions) float64 in [0, 1), from one counter-based Philox stream per response.
    """
    return _streams((seed, iteration), prompt_index, (sample,), positions)


def response_limits(seed: int, iteration: int, prompt_index: Tensor, sampling: Sampling, sample: int = 0) -> Tensor:
    """(B, 2) long: the fewest and the most tokens of each response; equal where lengths are drawn.

    Lengths are drawn from random streams of their own, independent of those of `uniforms`.
    """
    limits = torch.tensor([[sampling.min_new_tokens, sampling.max_new_tokens]]).repeat(len(prompt_index), 1)
    if sampling.draw_lengths:
        limits[:] = sampling.lengths_at(_streams((seed, iteration), prompt_index, (sample, _LENGTHS), 1))
    return limits


_LENGTHS = 1  # ends the key of the streams that lengths are drawn from


def _streams(before: tuple[int, ...], prompt_index: Tensor, after: tuple[int, ...], count: int) -> Tensor:
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence((*before, index, *after)))).random(count)
        for index in prompt_index.tolist()
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, count, dtype=torch.float64)


class Sampled(NamedTuple):
    """Tokens drawn at one position of B responses, and what they were drawn from.

    Attributes:
        tokens: (B,) long; `NO_TOKEN` where the logits are not numbers.
        log_probs: (B,) float32, log-probs of the tokens in the distributions that they were drawn from, in nats.
        kept: (B, V) bool, the tokens that could be drawn; None unless `Sampling.exact` asks for it.
    """

    tokens: Tensor
    log_probs: Tensor
    kept: Tensor | None


def sample_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Sampled:
    """Draw tokens at the inverse of the cumulative filtered distribution.

    Args:
        logits: (B, V) at one position.
        uniform: (B,) in [0, 1).
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, True) if sampling.exact else None
        return Sampled(tokens[:, 0], torch.zeros(len(logits), device=logits.device), kept)
    probabilities = filtered_probabilities(logits, sampling)
    cumulative = probabilities.double().cumsum(-1)
    # Scaling by the last entry, not by 1, keeps rounding of the sum from ever pointing past the last token.
    target = uniform.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)
    broken = ~cumulative[:, -1:].isfinite()
    drawn = probabilities.gather(1, tokens.masked_fill(broken, 0)) / cumulative[:, -1:]
    kept = probabilities > 0 if sampling.exact else None
    return Sampled(tokens.masked_fill(broken, NO_TOKEN)[:, 0], drawn.log().float()[:, 0], kept)


def filtered_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Softmax of (B, V) logits at the temperature, limited to the top k and the top p, not renormalised."""
    scaled = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        smallest_kept = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest_kept, -torch.inf)
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        dropped = torch.zeros_like(ordered, dtype=torch.bool).scatter(1, order, before >= sampling.top_p)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    return probabilities
