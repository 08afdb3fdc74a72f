"""Generates responses to prompts: many in batches, or one token by token."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from common.batching.collate import collate_prompts
from common.batching.sampler import MicroBatch, evaluation_batches
from common.data.options import naming_flags
from common.data.records import Prompt
from common.errors import named_by
from common.models.encoder_decoder import behind_prompts, prompt_width, start_id
from inference.loading import LoadedModel
from inference.options import DecodingOptions

Result = TypeVar("Result")


@dataclass(frozen=True)
class Response:
    """What a model wrote.

    Attributes:
        text: the text.
        ids: its tokens without the end token.
        ended: whether the model ended it, rather than the limit of its length.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool


def respond(
    actor: LoadedModel, prompts: Sequence[Prompt], decoding: DecodingOptions, batch_size: int
) -> list[Response]:
    """A response to each prompt, in the order of the prompts; see `respond_several`."""
    return [response for (response,) in respond_several(actor, prompts, decoding, batch_size, 1)]


@naming_flags()
def respond_several(
    actor: LoadedModel, prompts: Sequence[Prompt], decoding: DecodingOptions, batch_size: int, count: int
) -> list[list[Response]]:
    """So many responses to each prompt, in the order of the prompts: samples, or the best ends of a beam search.

    Prompts of similar length form a batch, padded on the left. If the model has too few positions, prompts are cut on
    the left, and a note says so.

    Args:
        batch_size: prompts of a batch; each of them stands in it as often as it is answered, or has beams.
        count: at most the number of beams, if there is a beam search.
    """
    codec = actor.codec
    with named_by("--max_new_tokens"):
        max_prompt_tokens = actor.max_prompt_tokens(decoding.max_new_tokens)
    encoded = [codec.encode_prompt(prompt) for prompt in prompts]
    if max_prompt_tokens is not None and (cut := sum(len(ids) > max_prompt_tokens for ids in encoded)):
        print(
            f"note: {cut} of {len(prompts)} prompts are too long for the model: they lose their beginning, all but "
            f"{max_prompt_tokens} tokens",
            file=sys.stderr,
            flush=True,
        )
        encoded = [codec.cut_prompt(ids, max_prompt_tokens) for ids in encoded]
    rows = Dataset.from_dict({"prompt_ids": encoded})

    def respond_to_batch(batch: MicroBatch) -> list[list[Response]]:
        padded = collate_prompts(rows, batch, codec.pad_id)
        sequences = _generate(actor, padded.input_ids, padded.attention_mask, decoding, count)
        found = [_to_response(actor, row) for row in sequences[:, padded.input_ids.shape[1] :].tolist()]
        return [found[start : start + count] for start in range(0, len(found), count)]

    return in_batches([len(row) for row in rows["prompt_ids"]], batch_size, respond_to_batch)


def in_batches(
    lengths: Sequence[int], batch_size: int, compute: Callable[[MicroBatch], Sequence[Result]]
) -> list[Result]:
    """One result per row, in the order of the rows; `compute` is called with batches of rows of similar length."""
    results: dict[int, Result] = {}
    for batch in evaluation_batches(lengths, batch_size, world_size=1, rank=0):
        computed = zip(batch.indices, batch.real, compute(batch))
        results.update({index: result for index, real, result in computed if real})
    return [results[index] for index in range(len(lengths))]


def stream_response(actor: LoadedModel, prompt_ids: list[int], decoding: DecodingOptions) -> Generator[int, None, None]:
    """The ids of a response, each as soon as it is generated; with beam search, all at the end.

    The model runs in a thread of its own. Closing the generator stops it after the current token.
    """
    arrived: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()
    input_ids = torch.tensor([prompt_ids])

    def work() -> None:
        outcome: BaseException | None = None
        try:
            streamer = _Sender(arrived) if decoding.num_beams == 1 else None
            sequences = _generate(
                actor,
                input_ids,
                torch.ones_like(input_ids),
                decoding,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
            )
            if streamer is None:
                arrived.put(sequences[0, len(prompt_ids) :].tolist())
        except BaseException as error:
            outcome = error
        arrived.put(outcome)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while isinstance(item := arrived.get(), list):
            yield from item
        if item is not None:
            raise item
    finally:
        stop.set()
        worker.join()


def _generate(
    actor: LoadedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    decoding: DecodingOptions,
    count: int = 1,
    **options: Any,
) -> Tensor:
    """(B, P) left-padded prompts -> (B * count, P + T) prompts with responses, padded after the end token."""
    sampled = decoding.temperature > 0
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        num_return_sequences=count,
        do_sample=sampled,
        use_cache=True,
        eos_token_id=list(actor.codec.end_ids),
        pad_token_id=actor.codec.pad_id,
        decoder_start_token_id=start_id(actor.model),
        **(sampling if sampled else {}),
    )
    # The model's own generation settings must not change what the options say.
    actor.model.generation_config = GenerationConfig()
    prompts = input_ids.to(actor.device)
    generated = actor.model.generate(
        input_ids=prompts,
        attention_mask=attention_mask.to(actor.device),
        generation_config=config,
        logits_processor=_repetition_rules(decoding, prompt_width(actor.model, input_ids)),
        **options,
    )
    return behind_prompts(actor.model, prompts, generated)


def _repetition_rules(decoding: DecodingOptions, prompt_width: int) -> LogitsProcessorList:
    rules: list[LogitsProcessor] = []
    if decoding.repetition_penalty != 1.0:
        rules.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.no_repeat_ngram_size:
        rules.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
    return LogitsProcessorList(_WithinResponse(rule, prompt_width) for rule in rules)


class _WithinResponse(LogitsProcessor):
    """A rule against repetition that does not look at the prompt.

    Otherwise a repeated question could not get the same response, and a model whose prompts start with the end token
    would be kept from ending its response.
    """

    def __init__(self, rule: LogitsProcessor, prompt_width: int):
        self._rule, self._prompt_width = rule, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._rule(input_ids[:, self._prompt_width :], scores)


class _Sender(BaseStreamer):
    """Puts each new token into a queue. The first call of `put` brings the prompt, which is left out."""

    def __init__(self, target: queue.SimpleQueue):
        self._target, self._prompt_seen = target, False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self._target.put(value.tolist())
        self._prompt_seen = True

    def end(self) -> None:
        pass


class _Stop(StoppingCriteria):
    """Stops every sequence as soon as the event is set."""

    def __init__(self, wanted: threading.Event):
        self._wanted = wanted

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._wanted.is_set(), device=input_ids.device)


def _to_response(actor: LoadedModel, ids: list[int]) -> Response:
    end = actor.codec.end_of(ids)
    return Response(actor.codec.decode_response(ids), tuple(ids[:end]), end < len(ids))
