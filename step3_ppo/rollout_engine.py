"""Our rollouts behind DeepSpeed's interface for rollout engines, for trainers that are written against that.

Step 3 itself does not go through it: a request has no room for what keys the random numbers.
"""
from __future__ import annotations

import torch
from deepspeed.runtime.rollout.base import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig

from common.batching.collate import PromptBatch
from step3_ppo.scoring import RolloutAbandoned
from step3_ppo.generation.rollout import ActorRollouts
from step3_ppo.generation.sampling import Sampling


class ActorRolloutEngine(RolloutEngine):
    """Responses in generation mode; the random numbers are keyed by the row of the request and the last synced step."""

    name = "generation_mode"

    def __init__(self, rollouts: ActorRollouts):
        self.rollouts, self.step = rollouts, 0

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Responses to left-padded prompts; those of one prompt are neighbours.

        Raises:
            RolloutAbandoned: this rank was told to stop meanwhile.
        """
        lengths = request.prompt_attention_mask.sum(1)
        prompts = PromptBatch(request.prompt_ids, request.prompt_attention_mask, lengths,
                              torch.arange(len(lengths)), torch.ones(len(lengths), dtype=torch.bool))
        samples = sampling.n_samples_per_prompt
        ours = Sampling(sampling.temperature, sampling.top_p, max(sampling.top_k, 0), 0, sampling.max_new_tokens,
                        samples_per_prompt=samples)
        rollout = self.rollouts.roll_out(prompts.to("cpu"), ours, self.step)
        if rollout is None:
            raise RolloutAbandoned
        responses = [rollout.tokens[row, start:end] for row, (start, end)
                     in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist()))]
        ids = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True, padding_value=self.rollouts.pad_id)
        mask = torch.arange(ids.shape[1], device=ids.device) < rollout.response_lengths[:, None]
        ids, mask = ids.to(request.prompt_ids), mask.to(request.prompt_attention_mask)
        return RolloutBatch(torch.cat([request.prompt_ids.repeat_interleave(samples, 0), ids], 1),
                            torch.cat([request.prompt_attention_mask.repeat_interleave(samples, 0), mask], 1),
                            torch.full((len(ids),), request.prompt_ids.shape[1], device=ids.device))

    def sync_weights(self, step: int) -> None:
        """The weights are the training engine's own; the step is noted for the random numbers."""
        self.step = step

    def shutdown(self) -> None:
        """Give back the memory of keys and values."""
        self.rollouts.cache = None
