"""Rollouts: the actor writes responses to prompts.

Two ways lead to the same tokens. In generation mode (see `generation_mode`) every rank decodes its own prompts with
continuous batching. The plain way, transformers' `generate` on batches that stay together, serves what the other
cannot: a ZeRO-3 actor that does not fit on one rank, whose layers are gathered for every token with all ranks in step,
and models that do not attend to the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from common.batching.collate import PromptBatch
from common.runtime.distributed import device, is_main, on_every_rank, say
from common.runtime.signals import stop_requested
from step3_ppo.experience import Rollout
from step3_ppo.generation.continuous_batching import Decoder, Request, SlotCache, can_decode
from step3_ppo.generation.generation_mode import generation_mode, whole_model_fits
from step3_ppo.generation.sampling import NO_TOKEN, Sampling, response_limits, sample_tokens, uniforms, without_ends

SECONDS_BEFORE_BAR = 15  # a rollout that takes longer shows how far it is


class ActorRollouts:
    """Responses of the actor, by its weights as they are when asked.

    Args:
        engine: the actor's DeepSpeed engine.
        slots: sequences that this rank decodes at a time.
        seed: of the random numbers.
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
        self._said = ""

    def roll_out(self, prompts: PromptBatch, sampling: Sampling, iteration: int) -> Rollout | None:
        """A response to every prompt, or several.

        Under ZeRO-3 all ranks must call it together.

        Args:
            prompts: of this rank; fillers get no response in generation mode.
            iteration: of the training run; part of the key of the random numbers.

        Returns:
            The responses, in the order of the prompts, those of one prompt together. `NO_TOKEN` is in those that the
            actor had no numbers for; no error yet, since other ranks may know nothing of it. None if this rank was
            told to stop meanwhile.
        """
        longest = prompts.input_ids.shape[1] + sampling.max_new_tokens
        reason = self._why_plain(longest)
        if reason:
            self._say_once(f"note: rollouts in batches that stay together, since {reason}")
            with _bar(len(prompts.lengths) * sampling.samples_per_prompt) as bar:
                parts = [
                    self._plainly(part, sampling, iteration, bar.update)
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
        if message != self._said:
            say(message)
            self._said = message

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
        # Those of one prompt next to each other.
        requests = [request for row in range(len(ids)) for request in requests[row :: len(ids)]]
        with _bar(len(requests)) as bar, generation_mode(self.engine) as model:
            decoder = Decoder(model, sampling, slots=self.slots, end_ids=self.end_ids, cache=self.cache)
            responses = decoder.run(requests, progress=bar.update)
        self.cache = decoder.cache if self.keep_cache else None
        if stop_requested():
            return None
        return joined(
            requests,
            responses,
            rows.prompt_index.repeat_interleave(sampling.samples_per_prompt),
            self.end_ids,
            self.pad_id,
        )

    def _plainly(
        self, prompts: PromptBatch, sampling: Sampling, iteration: int, progress: Callable[[int], None]
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
            )
            for sample in range(sampling.samples_per_prompt)
        ]
        order = torch.arange(len(parts) * len(prompts.lengths)).view(len(parts), -1).T.flatten()
        return Rollout.concat(parts).select(order)


def joined(
    requests: Sequence[Request],
    responses: Sequence[list[int]],
    prompt_index: Tensor,
    end_ids: Sequence[int],
    pad_id: int,
) -> Rollout:
    """Prompts and responses as a rollout, on the CPU. prompt_index (B,) long."""
    rows = [torch.tensor([*request.prompt, *response]) for request, response in zip(requests, responses)]
    tokens = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
        if rows
        else torch.empty(0, 1, dtype=torch.long)
    )
    return Rollout(
        tokens,
        torch.tensor([len(request.prompt) for request in requests], dtype=torch.long),
        torch.tensor([len(response) for response in responses], dtype=torch.long),
        torch.tensor([response[-1] in end_ids for response in responses], dtype=torch.bool),
        prompt_index,
        torch.ones(len(rows), dtype=torch.bool),
    )


def _bar(answers: int) -> tqdm:
    return tqdm(total=answers, desc="rollout", leave=False, delay=SECONDS_BEFORE_BAR, disable=not is_main())


class _ForcedChoice(LogitsProcessor):
    """Makes `generate`, whose cache and stopping serve every architecture, take the tokens we sample."""

    def __init__(
        self,
        prompt_width: int,
        uniform: Tensor,
        limits: Tensor,
        sampling: Sampling,
        end_ids: Sequence[int],
        progress: Callable[[int], None],
    ):
        self.prompt_width, self.uniform, self.limits = prompt_width, uniform, limits
        self.sampling, self.progress, self.ended = sampling, progress, 0
        self.ends = torch.tensor(end_ids, device=limits.device)
        self.broken = torch.zeros(len(limits), dtype=torch.bool, device=limits.device)  # rows that had no token to take

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_width
        scores = without_ends(scores, position < self.limits[:, 0], self.ends)
        tokens = sample_tokens(scores, self.uniform[:, position], self.sampling)
        # What follows a response that has come to its own limit is cut off; ending it saves the time. So does ending
        # all of them when the rollout will not be used; under ZeRO-3 no rank may leave by itself.
        self.broken |= tokens == NO_TOKEN
        over = self.broken | (position >= self.limits[:, 1]) | bool(stop_requested())
        tokens = torch.where(over, self.ends[0], tokens)
        has_ended = torch.isin(input_ids[:, self.prompt_width :], self.ends).any(1) | torch.isin(tokens, self.ends)
        self.show(int(has_ended.sum()))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)

    def show(self, ended: int) -> None:
        """So many responses have ended by now."""
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
    progress: Callable[[int], None] = lambda finished: None,
) -> Rollout:
    """One response to every prompt of the batch, the plain way. The batch goes on until its last response has ended.

    Under ZeRO-3 all ranks must call it together and stay in step until the last of them has finished.

    Args:
        engine: the actor's DeepSpeed engine.
        prompts: left-padded prompts of this rank.
        progress: called with the number of responses finished since the last call.
    """
    there = prompts.input_ids.device
    uniform = uniforms(seed, iteration, prompts.prompt_index, sampling.max_new_tokens, sample).to(there)
    limits = response_limits(seed, iteration, prompts.prompt_index, sampling, sample).to(there)
    width = prompts.input_ids.shape[1]
    choice = _ForcedChoice(width, uniform, limits, sampling, end_ids, progress)
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
        ),
        logits_processor=LogitsProcessorList([choice]),
        synced_gpus=engine.zero_optimization_partition_weights() and engine.dp_world_size > 1,
    )
    engine.train()
    choice.show(len(limits))
    sequences[:, width].masked_fill_(choice.broken, NO_TOKEN)
    return to_rollout(sequences, prompts, end_ids, pad_id, limits[:, 1])


def to_rollout(sequences: Tensor, prompts: PromptBatch, end_ids: Sequence[int], pad_id: int, limits: Tensor) -> Rollout:
    """Cut responses at their first end token and join them to their prompts without a gap.

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
    return Rollout(tokens, prompts.lengths, response_lengths, finished, prompts.prompt_index, prompts.real)
