"""Generates the actor's responses to prompts.

Two ways give the same tokens. In generation mode (see `generation_mode`) every rank decodes its own prompts with
continuous batching. The plain way calls transformers' `generate` on batches that stay together. It is used where
generation mode cannot be: for a ZeRO-3 actor that does not fit on one rank, whose layers are gathered for every token
with all ranks in step, and for models that do not attend to the whole sequence. An encoder-decoder generates the plain
way, but with the weights of generation mode where they fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from common.batching.collate import PromptBatch
from common.models.encoder_decoder import behind_prompts, prompt_width, start_id
from common.runtime.distributed import device, is_main, on_every_rank, say
from common.runtime.signals import stop_requested
from step3_ppo.generation.continuous_batching import Decoder, Request, SlotCache, can_decode
from step3_ppo.generation.generation_mode import generation_mode, whole_model_fits
from step3_ppo.generation.rollout import Rollout, join_responses, to_rollout
from step3_ppo.generation.sampler_record import SamplerRecord
from step3_ppo.generation.sampling import NO_TOKEN, Sampling, response_limits, sample_tokens, uniforms, without_ends

SECONDS_BEFORE_BAR = 15  # a rollout that takes longer shows a progress bar


class ActorRollouts:
    """Generates responses with the actor's current weights.

    Args:
        engine: the actor's DeepSpeed engine.
        slots: sequences that this rank decodes at a time.
        seed: seed of the random numbers.
        end_ids: tokens that end a response.
        gather: under ZeRO-3 gather the whole model on each rank, where that fits.
        keep_cache: keep the memory of keys and values from one rollout to the next.
    """

    def __init__(
        self,
        engine,
        *,
        slots: int,
        seed: int,
        end_ids: Sequence[int],
        pad_id: int,
        gather: bool = True,
        keep_cache: bool = True,
    ):
        self.engine, self.slots, self.seed, self.end_ids, self.pad_id = engine, slots, seed, end_ids, pad_id
        self.gather, self.keep_cache = gather, keep_cache
        self.cache: SlotCache | None = None
        self._last_message = ""

    def roll_out(self, prompts: PromptBatch, sampling: Sampling, iteration: int) -> Rollout | None:
        """`sampling.samples_per_prompt` responses to every prompt.

        Under ZeRO-3 all ranks must call it together.

        Args:
            prompts: this rank's prompts; fillers get no response in generation mode.
            iteration: number of the iteration; part of the key of the random numbers.

        Returns:
            The responses, in the order of the prompts, those of one prompt together. A response contains `NO_TOKEN`
            where the actor's logits were not finite; that is no error here, since only this rank knows of it. None if
            this rank was asked to stop meanwhile.
        """
        longest = prompts.input_ids.shape[1] + sampling.max_new_tokens
        reason, encoder_decoder = self._why_plain(longest), start_id(self.engine) is not None
        if reason or encoder_decoder:
            said = reason or "this model has an encoder"
            self._say_once(f"note: rollouts in batches that stay together, since {said}")
            weights = contextlib.nullcontext() if reason else generation_mode(self.engine)
            with _bar(len(prompts.lengths) * sampling.samples_per_prompt) as bar, weights:
                parts = [
                    self._plainly(part, sampling, iteration, bar.update, synced=bool(reason))
                    for part in prompts.to(device()).split(self.slots)
                ]
            return None if stop_requested() else Rollout.concat(parts)
        return self._in_generation_mode(prompts.select(prompts.real), sampling, iteration)

    def _why_plain(self, longest: int) -> str:
        if not on_every_rank(can_decode(self.engine.module.config, longest)):
            return "this model does not attend to whole sequences"
        if self.engine.zero_optimization_partition_weights():
            if not self.gather:
                return "--unpin_actor_parameters asks for weights that are gathered layer by layer"
            if not whole_model_fits(self.engine):
                return "the whole actor does not fit on a rank: its layers are gathered one by one, for every token"
        return ""

    def _say_once(self, message: str) -> None:
        if message != self._last_message:
            say(message)
            self._last_message = message

    def _in_generation_mode(self, prompts: PromptBatch, sampling: Sampling, iteration: int) -> Rollout | None:
        if self.engine.zero_optimization_partition_weights():
            self._say_once("note: for each rollout the whole actor is gathered on every rank")
        rows = prompts.to("cpu")
        width = rows.input_ids.shape[1]
        ids = [tuple(row[width - length :].tolist()) for row, length in zip(rows.input_ids, rows.lengths.tolist())]
        requests = []
        for sample in range(sampling.samples_per_prompt):
            uniform = uniforms(self.seed, iteration, rows.prompt_index, sampling.max_new_tokens, sample)
            limits = response_limits(self.seed, iteration, rows.prompt_index, sampling, sample)
            requests += [Request(*request) for request in zip(ids, uniform, *limits.T.tolist())]
        # Sort them so that the samples of one prompt are neighbours.
        requests = [request for row in range(len(ids)) for request in requests[row :: len(ids)]]
        with _bar(len(requests)) as bar, generation_mode(self.engine) as model:
            decoder = Decoder(model, sampling, slots=self.slots, end_ids=self.end_ids, cache=self.cache)
            record = SamplerRecord(len(requests), sampling, decoder.device)
            responses = decoder.run(requests, bar.update, record)
        self.cache = decoder.cache if self.keep_cache else None
        if stop_requested():
            return None
        rollout = join_responses(
            [request.prompt for request in requests],
            responses,
            rows.prompt_index.repeat_interleave(sampling.samples_per_prompt),
            self.end_ids,
            self.pad_id,
        )
        return record.attached_to(rollout)

    def _plainly(
        self, prompts: PromptBatch, sampling: Sampling, iteration: int, progress: Callable[[int], object], synced: bool
    ) -> Rollout:
        parts = [
            generate(
                self.engine,
                prompts,
                sampling,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                seed=self.seed,
                iteration=iteration,
                sample=sample,
                progress=progress,
                synced=synced,
            )
            for sample in range(sampling.samples_per_prompt)
        ]
        order = torch.arange(len(parts) * len(prompts.lengths)).view(len(parts), -1).T.flatten()
        return Rollout.concat(parts).select(order)


def _bar(responses: int) -> tqdm:
    return tqdm(total=responses, desc="rollout", leave=False, delay=SECONDS_BEFORE_BAR, disable=not is_main())


class _ForcedChoice(LogitsProcessor):
    """Makes transformers' `generate` take the tokens that `sample_tokens` draws."""

    def __init__(
        self,
        prompt_width: int,
        uniform: Tensor,
        limits: Tensor,
        sampling: Sampling,
        end_ids: Sequence[int],
        progress: Callable[[int], object],
    ):
        self.prompt_width, self.uniform, self.limits = prompt_width, uniform, limits
        self.sampling, self.progress, self.ended = sampling, progress, 0
        self.record = SamplerRecord(len(limits), sampling, limits.device)
        self.rows = torch.arange(len(limits), device=limits.device)
        self.ends = torch.tensor(end_ids, device=limits.device)
        self.broken = torch.zeros(len(limits), dtype=torch.bool, device=limits.device)  # rows with logits not finite

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_width
        scores = without_ends(scores, position < self.limits[:, 0], self.ends)
        sampled = sample_tokens(scores, self.uniform[:, position], self.sampling)
        self.record.add(self.rows, torch.full_like(self.rows, position), sampled)
        tokens = sampled.tokens
        # Tokens after a response's own limit are cut off later, so end it now to save time. When the run was asked
        # to stop, end all responses: under ZeRO-3 no rank may leave `generate` alone.
        self.broken |= tokens == NO_TOKEN
        over = self.broken | (position >= self.limits[:, 1]) | bool(stop_requested())
        tokens = torch.where(over, self.ends[0], tokens)
        has_ended = torch.isin(input_ids[:, self.prompt_width :], self.ends).any(1) | torch.isin(tokens, self.ends)
        self.report_ended(int(has_ended.sum()))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)

    def report_ended(self, ended: int) -> None:
        """Advance the progress bar to `ended` finished responses."""
        self.progress(ended - self.ended)
        self.ended = ended


@torch.no_grad()
def generate(
    engine,
    prompts: PromptBatch,
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
    iteration: int,
    sample: int = 0,
    progress: Callable[[int], object] = lambda finished: None,
    synced: bool = True,
) -> Rollout:
    """One response to every prompt, the plain way. The batch goes on until its last response has ended.

    Under ZeRO-3 all ranks must call it together and stay in step until the last of them has finished.

    Args:
        engine: the actor's DeepSpeed engine.
        prompts: left-padded prompts of this rank.
        progress: called with the number of responses finished since the last call.
        synced: False if each rank has the whole weights, in generation mode.
    """
    uniform = uniforms(seed, iteration, prompts.prompt_index, sampling.max_new_tokens, sample)
    limits = response_limits(seed, iteration, prompts.prompt_index, sampling, sample).to(prompts.input_ids.device)
    width = prompt_width(engine, prompts.input_ids)
    choice = _ForcedChoice(width, uniform.to(limits.device), limits, sampling, end_ids, progress)
    engine.eval()
    sequences = engine.module.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        generation_config=GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(end_ids),
            pad_token_id=pad_id,
            decoder_start_token_id=start_id(engine),
        ),
        logits_processor=LogitsProcessorList([choice]),
        synced_gpus=synced and engine.zero_optimization_partition_weights() and engine.dp_world_size > 1,
    )
    engine.train()
    choice.report_ended(len(limits))
    sequences[:, width].masked_fill_(choice.broken, NO_TOKEN)
    sequences = behind_prompts(engine, prompts.input_ids, sequences)
    return choice.record.attached_to(to_rollout(sequences, prompts, end_ids, pad_id, limits[:, 1]))
