"""Rollouts: the actor writes a response to every prompt.

Randomness is fixed before decoding: one uniform number per (seed, iteration, prompt, sample, position), turned into
a token by the inverse of the cumulative distribution. So a response depends on its prompt and the weights alone, not
on the rank, the batch or the slot it was decoded in, nor on what was decoded before it.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from common.data.collate import PromptBatch
from step3_ppo.config import PPOConfig
from step3_ppo.experience import Rollout


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled; the same temperature is used for the log-probs that are trained on.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep the most probable k tokens; 0 keeps all.
        min_new_tokens: the end token is impossible before so many tokens.
        max_new_tokens: a response that has not ended by then is cut.
    """
    temperature: float
    top_p: float
    top_k: int
    min_new_tokens: int
    max_new_tokens: int

    @property
    def truncated(self) -> bool:
        """True if the policy that is sampled from is not the one that is trained."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_new_tokens > 0

    @classmethod
    def from_config(cls, config: PPOConfig) -> Sampling:
        """As the options of step 3 say."""
        return cls(config.temperature, config.top_p, config.top_k, config.min_answer_seq_len,
                   config.max_answer_seq_len)


def uniforms(seed: int, iteration: int, prompt_index: Tensor, positions: int, sample: int = 0) -> Tensor:
    """The uniform numbers that decide each response.

    Args:
        prompt_index: (B,) row of each prompt in its data set.
        positions: how many response tokens may be needed.
        sample: number of the response, where a prompt gets several.

    Returns:
        (B, positions) float64 in [0, 1), from one counter-based Philox stream per response.
    """
    rows = [np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, iteration, index, sample))))
            .random(positions) for index in prompt_index.tolist()]
    return torch.from_numpy(np.stack(rows))


def sample_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Tokens at the inverse of the cumulative filtered distribution.

    Args:
        logits: (B, V) at one position.
        uniform: (B,) in [0, 1).

    Returns:
        (B,) long.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = filtered_probabilities(logits, sampling)
    cumulative = probabilities.double().cumsum(-1)
    # Scaling by the last entry, not by 1, keeps rounding of the sum from ever pointing past the last token.
    target = uniform.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


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


class _ForcedChoice(LogitsProcessor):
    """Makes `generate`, whose cache and stopping serve every architecture, take the tokens we sample."""

    def __init__(self, prompt_width: int, uniform: Tensor, sampling: Sampling, end_id: int):
        self.prompt_width, self.uniform, self.sampling, self.end_id = prompt_width, uniform, sampling, end_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_width
        if position < self.sampling.min_new_tokens:
            scores = scores.clone()
            scores[:, self.end_id] = -torch.inf
        tokens = sample_tokens(scores, self.uniform[:, position], self.sampling)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)


@torch.no_grad()
def generate(engine, prompts: PromptBatch, sampling: Sampling, *, end_id: int, pad_id: int, seed: int,
             iteration: int) -> Rollout:
    """One response to every prompt of the batch, by the weights as they are now.

    Under ZeRO-3 all ranks must call it together and stay in step until the last of them has finished.

    Args:
        engine: the actor's DeepSpeed engine.
        prompts: left-padded prompts of this rank.
        iteration: of the training run; part of the key of the random numbers.
    """
    uniform = uniforms(seed, iteration, prompts.prompt_index, sampling.max_new_tokens).to(prompts.input_ids.device)
    width = prompts.input_ids.shape[1]
    engine.eval()
    sequences = engine.module.generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask,
        generation_config=GenerationConfig(max_new_tokens=sampling.max_new_tokens, do_sample=False, use_cache=True,
                                           eos_token_id=end_id, pad_token_id=pad_id),
        logits_processor=LogitsProcessorList([_ForcedChoice(width, uniform, sampling, end_id)]),
        synced_gpus=engine.zero_optimization_partition_weights() and engine.dp_world_size > 1)
    engine.train()
    return to_rollout(sequences, prompts, end_id, pad_id, sampling.max_new_tokens)


def to_rollout(sequences: Tensor, prompts: PromptBatch, end_id: int, pad_id: int, max_new_tokens: int) -> Rollout:
    """Cut responses at their first end token and join them to their prompts without a gap.

    Args:
        sequences: (B, P + T) left-padded prompts followed by responses; what follows an end token is ignored.
    """
    width = prompts.input_ids.shape[1]
    responses = sequences[:, width:width + max_new_tokens]
    ends = responses == end_id
    finished = ends.any(1)
    response_lengths = torch.where(finished, ends.int().argmax(1) + 1, responses.shape[1])
    # Rolling each row left by its padding moves the padding behind the response.
    columns = torch.arange(sequences.shape[1], device=sequences.device)
    shift = (width - prompts.lengths).unsqueeze(1)
    tokens = sequences.gather(1, (columns + shift) % sequences.shape[1])
    lengths = prompts.lengths + response_lengths
    tokens = tokens.masked_fill(columns >= lengths.unsqueeze(1), pad_id)[:, :int(lengths.max())]
    return Rollout(tokens, prompts.lengths, response_lengths, finished, prompts.prompt_index, prompts.real)
