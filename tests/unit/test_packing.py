"""Bin packing, and rows packed into shared sequences."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from common.batching.bin_packing import balanced, best_fit, packed
from common.batching.collate import block_causal_mask, collate_demonstrations
from common.batching.sampler import MicroBatch
from tests.sampling import ranks, real_rows

some_sizes = st.lists(st.integers(1, 100), max_size=60)
capacities = st.integers(1, 150)


def sums(sizes, bins) -> list[int]:
    return [sum(sizes[place] for place in bin_) for bin_ in bins]


@given(some_sizes, st.integers(1, 9))
def test_balanced_bins_hold_everything_once_and_differ_by_one_size_at_most(sizes, bins):
    dealt = balanced(sizes, bins)
    assert len(dealt) == bins and sorted(place for bin_ in dealt for place in bin_) == list(range(len(sizes)))
    assert max(sums(sizes, dealt)) - min(sums(sizes, dealt)) <= max(sizes, default=0)


@pytest.mark.parametrize("pack", [best_fit, packed])
@given(sizes=some_sizes, capacity=capacities)
def test_packed_bins_hold_everything_once_within_the_capacity(pack, sizes, capacity):
    bins = pack(sizes, capacity)
    assert sorted(place for bin_ in bins for place in bin_) == list(range(len(sizes)))
    assert all(bin_ for bin_ in bins)
    assert all(total <= capacity or len(bin_) == 1 for total, bin_ in zip(sums(sizes, bins), bins))


@given(some_sizes, st.integers(100, 150))
def test_no_two_bins_fit_into_one(sizes, capacity):
    totals = sums(sizes, best_fit(sizes, capacity))
    assert all(one + other > capacity for number, one in enumerate(totals) for other in totals[:number])
    assert len(packed(sizes, capacity)) == len(totals)


def test_a_row_goes_where_it_leaves_least_room():
    assert best_fit([60, 50, 40, 45], 100) == [[0, 2], [1, 3]]


def test_bins_are_filled_alike_where_that_takes_no_more_of_them():
    assert sums([8, 6, 2], best_fit([8, 6, 2], 10)) == [10, 6]
    assert sums([8, 6, 2], packed([8, 6, 2], 10)) == [8, 8]


def test_a_position_sees_its_own_row_up_to_itself():
    rows = torch.tensor([[1, 1, 2, 2, 2, 0]])
    seen = block_causal_mask(rows, torch.bfloat16)[0, 0] == 0
    assert [line.nonzero().flatten().tolist() for line in seen] == [[0], [0, 1], [2], [2, 3], [2, 3, 4], [5]]


lengths_of_rows = st.lists(st.integers(1, 60), min_size=1, max_size=80)
small = st.integers(1, 3)


@given(lengths_of_rows, small, small, small, st.integers(60, 120), st.sampled_from([0, 30, 60, 250]))
def test_packing_changes_how_a_step_is_cut_and_not_its_rows(lengths, rows, micro_batches, world_size, width, tokens):
    def steps(**packing):
        return list(zip(*ranks(lengths, rows, micro_batches, world_size, **packing)))

    def rows_of(step):
        return sorted(row for batches in step for row in real_rows(batches))

    plain, found = steps(), steps(pack_to=width, max_tokens=tokens)
    assert [rows_of(step) for step in found] == [rows_of(step) for step in plain]
    for step in found:
        assert len({len(of_rank) for of_rank in step}) == 1
        assert len(step[0]) <= micro_batches or tokens
        for batch in (batch for of_rank in step for batch in of_rank):
            assert sum(batch.packs) == len(batch.indices) and min(batch.packs) > 0
            ends = [sum(batch.packs[: number + 1]) for number in range(len(batch.packs))]
            totals = [
                sum(lengths[row] for row in batch.indices[end - rows_ : end]) for end, rows_ in zip(ends, batch.packs)
            ]
            assert max(totals) <= width and (tokens or len(totals) <= rows)
            assert len(totals) * max(totals) <= (tokens or rows * width) or len(batch.indices) == 1


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_packed_rows_are_the_rows_with_their_targets_and_positions(train_on_prompt):
    """Padded with the end token, which is also within rows."""
    data = Dataset.from_dict({"prompt_ids": [[7, 8, 9], [7], [5, 5]], "response_ids": [[10, 2], [11, 12, 13, 2], [2]]})
    plain = collate_demonstrations(data, MicroBatch((0, 1, 2), (True, True, False)), 2, train_on_prompt)
    order = (2, 0, 1)
    batch = collate_demonstrations(data, MicroBatch(order, (False, True, True), packs=(2, 1)), 2, train_on_prompt)
    assert batch.input_ids.shape == (2, 8)
    for row in range(3):
        here = batch.rows == order.index(row) + 1
        length = int(plain.lengths[row])
        assert batch.input_ids[here].tolist() == plain.input_ids[row, :length].tolist()
        assert batch.loss_mask[here].tolist() == plain.loss_mask[row, :length].tolist()
        assert batch.position_ids[here].tolist() == list(range(length))
    assert not batch.loss_mask[batch.rows == 0].any() and int((batch.rows == 0).sum()) == 3
