"""From prompt ids to answer ids: a batch at once, or one answer token by token."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

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
from inference.loading import Loaded
from inference.options import DecodingOptions

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """Its text, its tokens without the end token, and whether it ended by itself."""

    text: str
    ids: tuple[int, ...]
    ended: bool


@naming_flags()
def answer_prompts(
    speaker: Loaded, prompts: Sequence[Prompt], decoding: DecodingOptions, batch_size: int
) -> list[Answer]:
    """An answer to each prompt, in their order.

    Prompts of like length are padded on the left and answered together. Where the model has too few positions
    they are cut on the left, and that is said.
    """
    codec, room = speaker.codec, speaker.room(decoding.max_new_tokens)
    whole = [codec.encode_prompt(prompt) for prompt in prompts]
    if room is not None and (cut := sum(len(ids) > room for ids in whole)):
        print(
            f"note: {cut} of {len(prompts)} prompts are too long for the model: they lose their beginning, all but "
            f"{room} tokens",
            file=sys.stderr,
            flush=True,
        )
        whole = [codec.cut_prompt(ids, room) for ids in whole]
    rows = Dataset.from_dict({"prompt_ids": whole})

    def answer(batch: MicroBatch) -> list[Answer]:
        padded = collate_prompts(rows, batch, codec.pad_id)
        sequences = _generate(speaker, padded.input_ids, padded.attention_mask, decoding)
        return [_to_answer(speaker, row) for row in sequences[:, padded.input_ids.shape[1] :].tolist()]

    return in_batches([len(row) for row in rows["prompt_ids"]], batch_size, answer)


def in_batches(
    lengths: Sequence[int], batch_size: int, compute: Callable[[MicroBatch], Sequence[Result]]
) -> list[Result]:
    """One result per row, in the order of the rows, computed for batches of rows of like length."""
    results: dict[int, Result] = {}
    for batch in evaluation_batches(lengths, batch_size, world_size=1, rank=0):
        computed = zip(batch.indices, batch.real, compute(batch))
        results.update({index: result for index, real, result in computed if real})
    return [results[index] for index in range(len(lengths))]


def stream_answer(speaker: Loaded, prompt_ids: list[int], decoding: DecodingOptions) -> Iterator[int]:
    """The ids of an answer as they are decided; with beams, all at the end.

    Closing the iterator stops the model, which works in a thread of its own, after its current token.
    """
    arrived: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()
    input_ids = torch.tensor([prompt_ids])

    def work() -> None:
        outcome = None
        try:
            streamer = _Sender(arrived) if decoding.num_beams == 1 else None
            sequences = _generate(
                speaker,
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
    speaker: Loaded, input_ids: Tensor, attention_mask: Tensor, decoding: DecodingOptions, **options
) -> Tensor:
    """(B, P) left-padded prompts -> (B, P + T), what follows an end token being padding."""
    sampled = decoding.temperature > 0
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        do_sample=sampled,
        use_cache=True,
        eos_token_id=list(speaker.codec.end_ids),
        pad_token_id=speaker.codec.pad_id,
        **(sampling if sampled else {}),
    )
    # What the model's directory recommends must not change what the options say.
    speaker.model.generation_config = GenerationConfig()
    return speaker.model.generate(
        input_ids=input_ids.to(speaker.device),
        attention_mask=attention_mask.to(speaker.device),
        generation_config=config,
        logits_processor=_repetition_rules(decoding, input_ids.shape[1]),
        **options,
    )


def _repetition_rules(decoding: DecodingOptions, prompt_width: int) -> LogitsProcessorList:
    rules = []
    if decoding.repetition_penalty != 1.0:
        rules.append(RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty))
    if decoding.no_repeat_ngram_size:
        rules.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram_size))
    return LogitsProcessorList(_WithinAnswer(rule, prompt_width) for rule in rules)


class _WithinAnswer(LogitsProcessor):
    """A rule against repetition that does not look at the prompt.

    Else a question asked twice could not be answered twice, and a model whose texts start with its end token
    would be kept from ending them.
    """

    def __init__(self, rule: LogitsProcessor, prompt_width: int):
        self._rule, self._prompt_width = rule, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._rule(input_ids[:, self._prompt_width :], scores)


class _Sender(BaseStreamer):
    """Hands on each new token; `generate` gives it the prompt first."""

    def __init__(self, target: queue.SimpleQueue):
        self._target, self._prompt_seen = target, False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self._target.put(value.tolist())
        self._prompt_seen = True

    def end(self) -> None:
        pass


class _Stop(StoppingCriteria):
    def __init__(self, wanted: threading.Event):
        self._wanted = wanted

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        return torch.full((len(input_ids),), self._wanted.is_set(), device=input_ids.device)


def _to_answer(speaker: Loaded, ids: list[int]) -> Answer:
    end = speaker.codec.end_of(ids)
    return Answer(speaker.codec.decode_response(ids), tuple(ids[:end]), end < len(ids))
