"""Computes raw reward-model scores of responses given as text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from datasets import Dataset

from common.batching.collate import collate_texts
from common.batching.sampler import MicroBatch
from common.data.options import naming_flags
from common.data.records import Prompt
from common.models.scalar import EncoderModel, sequence_scores
from common.rewards.text_model import dialogue_ids
from inference.decoding import Response, in_batches
from inference.loading import LoadedModel


@torch.inference_mode()
def score_responses(
    reward_model: LoadedModel, prompts: Sequence[Prompt], responses: Sequence[Response], batch_size: int
) -> list[float]:
    """The score of each response; one that did not end by itself is scored without its end token, but by an encoder,
    which reads whole texts, with it.

    Prompts and responses are tokenized again, with the template and tokenizer of the reward model, so that models
    with different tokenizers can be compared. If it has too few positions, dialogues lose their beginning.
    """
    rows = Dataset.from_dict({"input_ids": [_ids(reward_model, *pair) for pair in zip(prompts, responses)]})

    def score(batch: MicroBatch) -> list[float]:
        padded = collate_texts(rows, batch, reward_model.codec.pad_id).to(reward_model.device)
        return sequence_scores(reward_model.model, padded.input_ids, padded.lengths).tolist()

    return in_batches([len(row) for row in rows["input_ids"]], batch_size, score)


@naming_flags()
def _ids(reward_model: LoadedModel, prompt: Prompt, response: Response) -> list[int]:
    ended = response.ended or isinstance(reward_model.model, EncoderModel)
    return dialogue_ids(reward_model.codec, prompt, response.text, ended, reward_model.positions)
