"""Raw scores of a reward model for answers that are given as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset

from common.batching.collate import collate_texts
from common.batching.sampler import MicroBatch
from common.data.options import naming_flags
from common.data.records import Prompt
from common.models.scalar import score_at_last_token
from inference.decoding import Answer, in_batches
from inference.loading import Loaded


@torch.inference_mode()
def score_answers(judge: Loaded, prompts: Sequence[Prompt], answers: Sequence[Answer], batch_size: int) -> list[float]:
    """The score at the last token of each answer; that is the end token if the answer ended by itself.

    Prompts and answers are tokenized anew, with the template and tokenizer of the reward model: so models
    with other tokenizers can be compared. Where it has too few positions, prompts are cut on the left.
    """
    rows = Dataset.from_dict({"input_ids": [_ids(judge, *pair) for pair in zip(prompts, answers)]})

    def score(batch: MicroBatch) -> list[float]:
        padded = collate_texts(rows, batch, judge.codec.pad_id).to(judge.device)
        numbers = judge.model(padded.input_ids, padded.attention_mask)
        return score_at_last_token(numbers, padded.lengths).tolist()

    return in_batches([len(row) for row in rows["input_ids"]], batch_size, score)


@naming_flags()
def _ids(judge: Loaded, prompt: Prompt, answer: Answer) -> list[int]:
    codec = judge.codec
    response = codec.encode_response(answer.text)
    if not answer.ended:
        response = response[:-1]
    if judge.positions is None:
        return codec.encode_prompt(prompt) + response
    response = response[: judge.positions - codec.shortest_prompt]
    return codec.encode_prompt(prompt, judge.positions - len(response)) + response
