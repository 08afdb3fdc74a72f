"""Rows of ids become padded tensors with the right targets."""

import pytest
import torch
from datasets import Dataset

from common.batching.collate import collate_comparisons, collate_demonstrations, collate_prompts, collate_texts
from common.batching.sampler import MicroBatch

END = 2
PAD_IDS = pytest.mark.parametrize("pad_id", [0, END])  # padding with the end token must change nothing
DEMONSTRATIONS = Dataset.from_dict(
    {"prompt_ids": [[7, 8, 9], [7], [5, 5]], "response_ids": [[10, END], [11, 12, 13, END], [END]]}
)
COMPARISONS = Dataset.from_dict(
    {"prompt_ids": [[7, 8], [6]], "chosen_ids": [[10, END], [11, END]], "rejected_ids": [[12, 13, 14, END], [END]]}
)


def real(*indices: int) -> MicroBatch:
    return MicroBatch(indices, (True,) * len(indices))


@PAD_IDS
def test_targets_of_a_demonstration_are_its_response_with_the_end_token(pad_id):
    batch = collate_demonstrations(DEMONSTRATIONS, real(0, 1, 2), pad_id)
    for row, mask, expected in zip(batch.input_ids, batch.loss_mask, DEMONSTRATIONS["response_ids"]):
        assert row[mask].tolist() == expected
    for row, mask, index in zip(batch.input_ids, batch.attention_mask.bool(), range(3)):
        whole = DEMONSTRATIONS[index]["prompt_ids"] + DEMONSTRATIONS[index]["response_ids"]
        assert row[mask].tolist() == whole
    assert batch.lengths.tolist() == [5, 5, 3]


@PAD_IDS
def test_training_on_prompts_takes_all_tokens_but_the_first(pad_id):
    batch = collate_demonstrations(DEMONSTRATIONS, real(0, 2), pad_id, train_on_prompt=True)
    assert batch.loss_mask.tolist() == [[False, True, True, True, True], [False, True, True, False, False]]


@PAD_IDS
def test_texts_are_targets_but_for_the_first_token(pad_id):
    texts = Dataset.from_dict({"input_ids": [[3, 4, END], [5, END]]})
    batch = collate_texts(texts, real(0, 1), pad_id)
    assert batch.loss_mask.sum(1).tolist() == [2, 1]
    assert batch.input_ids[1][batch.loss_mask[1]].tolist() == [END]


def test_batches_are_as_wide_as_their_own_longest_row():
    assert collate_demonstrations(DEMONSTRATIONS, real(2), 0).input_ids.shape == (1, 3)
    assert collate_demonstrations(DEMONSTRATIONS, real(2, 1), 0).input_ids.shape == (2, 5)
    assert collate_prompts(DEMONSTRATIONS, real(2, 1), 0).input_ids.shape == (2, 2)


def test_fillers_are_no_targets():
    filled = MicroBatch((1, 2, 2), (True, True, False))
    batch = collate_demonstrations(DEMONSTRATIONS, filled, 0)
    assert batch.loss_mask.sum(1).tolist() == [4, 1, 0]
    assert collate_demonstrations(DEMONSTRATIONS, filled, 0, train_on_prompt=True).loss_mask[2].sum() == 0
    assert collate_prompts(DEMONSTRATIONS, filled, 0).real.tolist() == [True, True, False]
    pair = collate_comparisons(COMPARISONS, MicroBatch((0, 0), (True, False)), 0)
    assert pair.real.tolist() == [True, False]


@PAD_IDS
def test_pairs_are_the_chosen_rows_and_then_the_rejected_ones(pad_id):
    batch = collate_comparisons(COMPARISONS, real(0, 1), pad_id)
    rows = [row[:length].tolist() for row, length in zip(batch.input_ids, batch.lengths)]
    assert rows == [[7, 8, 10, END], [6, 11, END], [7, 8, 12, 13, 14, END], [6, END]]
    assert batch.attention_mask.sum(1).tolist() == batch.lengths.tolist()


@PAD_IDS
def test_prompts_end_at_the_right_edge(pad_id):
    batch = collate_prompts(DEMONSTRATIONS, real(1, 0), pad_id)
    assert batch.input_ids.tolist() == [[pad_id, pad_id, 7], [7, 8, 9]]
    assert batch.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch.prompt_index.tolist() == [1, 0]
    assert batch.lengths.tolist() == [1, 3]


def test_batches_move_whole():
    batch = collate_prompts(DEMONSTRATIONS, real(1, 0), 0).to("meta")
    assert {value.device.type for value in vars(batch).values()} == {"meta"}


def test_types():
    batch = collate_demonstrations(DEMONSTRATIONS, real(0, 1), 0)
    assert (batch.input_ids.dtype, batch.attention_mask.dtype, batch.lengths.dtype) == (torch.long,) * 3
    assert batch.loss_mask.dtype == torch.bool
