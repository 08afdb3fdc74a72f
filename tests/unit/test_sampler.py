"""The rows of each optimizer step and each evaluation, on every rank."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.batching.sampler import MicroBatch, StepSampler, evaluation_batches, token_budget_batches
from common.data.blend import parse_data_path
from common.data.reading import ReadReport, read_records
from tests.sampling import ranks, real_rows

some_lengths = st.lists(st.integers(1, 500), min_size=1, max_size=150)
small = st.integers(1, 4)


def step_rows(seen) -> list[Counter]:
    """The real rows of each global step."""
    return [Counter(row for step in steps for row in real_rows(step)) for steps in zip(*seen)]


def padded_tokens(batches, lengths) -> int:
    return sum(len(batch.indices) * max(lengths[row] for row in batch.indices) for batch in batches)


@given(some_lengths, small, small, small, st.booleans())
def test_every_row_once_in_an_epoch_and_equal_counts_on_every_rank(lengths, rows, micro_batches, world_size, grouped):
    seen = ranks(lengths, rows, micro_batches, world_size, group_by_length=grouped)
    assert sum(step_rows(seen), Counter()) == Counter(range(len(lengths)))
    steps = -(-len(lengths) // (rows * micro_batches * world_size))
    for steps_of_rank in seen:
        assert [len(step) for step in steps_of_rank] == [micro_batches] * steps
        assert all(len(batch.indices) == len(batch.real) == rows for step in steps_of_rank for batch in step)


@given(some_lengths, small, st.integers(0, 5), st.booleans())
def test_steps_are_the_same_on_any_number_of_ranks(lengths, rows, epoch, grouped):
    """12 micro-batches a step, dealt as 1 x 12, 2 x 6, 3 x 4, 12 x 1; one of 12 x rows is the same step."""

    def steps(rows, micro_batches, world_size):
        return step_rows(ranks(lengths, rows, micro_batches, world_size, epoch=epoch, group_by_length=grouped))

    expected = steps(rows, 12, 1)
    assert steps(12 * rows, 1, 1) == expected
    for world_size in (2, 3, 12):
        assert steps(rows, 12 // world_size, world_size) == expected


def test_order_depends_on_seed_and_epoch_alone():
    lengths = list(range(1, 200))
    first = ranks(lengths, 2, 2, 2, seed=1, epoch=0)
    assert ranks(lengths, 2, 2, 2, seed=1, epoch=0) == first
    assert ranks(lengths, 2, 2, 2, seed=1, epoch=1) != first
    assert ranks(lengths, 2, 2, 2, seed=2, epoch=0) != first


@pytest.mark.parametrize("grouped", [False, True])
def test_other_epochs_put_other_rows_together(grouped):
    lengths = [row % 37 + 1 for row in range(400)]
    first, second = (
        {frozenset(rows) for rows in step_rows(ranks(lengths, 4, 1, 1, epoch=epoch, group_by_length=grouped))}
        for epoch in (0, 1)
    )
    assert len(first & second) < len(first) / 10


def spread_of_mean_lengths(steps, lengths) -> float:
    """Standard deviation over steps of the mean length of a step's rows."""
    return np.std([np.mean([lengths[row] for row in rows]) for rows in steps])


def test_a_step_is_a_random_sample_of_the_rows():
    """The mean length of 20,000 rows' steps of 128 varies as that of samples drawn without replacement does."""
    lengths = np.random.default_rng(0).integers(1, 257, 20_000)
    seen = [rows for epoch in range(4) for rows in step_rows(ranks(lengths, 16, 4, 2, epoch=epoch))]
    whole = [rows for rows in seen if rows.total() == 128]
    expected = lengths.std() / 128**0.5
    # The standard deviation of an estimate from n steps is about its size over the root of 2 n: 2.8 percent here.
    assert spread_of_mean_lengths(whole, lengths) == pytest.approx(expected, rel=0.12)


def test_with_group_by_length_steps_hold_rows_of_similar_length_and_little_is_padded():
    lengths = [(row * 7919) % 500 + 1 for row in range(4000)]
    seen = ranks(lengths, 4, 4, 2, group_by_length=True)
    grouped = [sum(padded_tokens(step, lengths) for step in steps) for steps in seen]
    as_they_come = [MicroBatch(tuple(range(i, i + 4)), (True,) * 4) for i in range(0, 4000, 4)]
    random = padded_tokens(as_they_come, lengths)
    assert sum(grouped) / sum(lengths) - 1 < 0.1 * (random / sum(lengths) - 1)
    assert max(grouped) / min(grouped) < 1.02
    assert spread_of_mean_lengths(step_rows(seen), lengths) > 0.8 * np.std(lengths)


def test_rows_of_similar_length_share_micro_batches_within_a_random_step():
    lengths = [(row * 7919) % 500 + 1 for row in range(4000)]
    padded = sum(padded_tokens(step, lengths) for steps in ranks(lengths, 4, 4, 2) for step in steps)
    as_they_come = [MicroBatch(tuple(range(i, i + 4)), (True,) * 4) for i in range(0, 4000, 4)]
    assert padded / sum(lengths) - 1 < 0.35 * (padded_tokens(as_they_come, lengths) / sum(lengths) - 1)


@given(some_lengths, small, small)
def test_fillers_repeat_a_row_of_their_own_step(lengths, rows, world_size):
    for steps in zip(*ranks(lengths, rows, 2, world_size)):
        known = {row for step in steps for row in real_rows(step)}
        assert {row for step in steps for batch in step for row in batch.indices} == known


@given(some_lengths, small, small)
def test_an_evaluation_sees_every_row_once_on_equally_many_batches(lengths, rows, world_size):
    seen = [evaluation_batches(lengths, rows, world_size, rank) for rank in range(world_size)]
    assert sorted(row for batches in seen for row in real_rows(batches)) == list(range(len(lengths)))
    assert len({len(batches) for batches in seen}) == 1
    assert all(len(batch.indices) == rows for batches in seen for batch in batches)


@given(some_lengths, small, small, st.integers(1, 30))
def test_a_shortened_evaluation_is_the_same_on_any_number_of_ranks(lengths, rows, world_size, max_batches):
    alone = evaluation_batches(lengths, rows, 1, 0, max_batches)
    dealt = [evaluation_batches(lengths, rows, world_size, rank, max_batches) for rank in range(world_size)]
    assert len(alone) == min(max_batches, -(-len(lengths) // rows))
    assert len({len(batches) for batches in dealt}) == 1
    assert sorted(row for batches in dealt for row in real_rows(batches)) == sorted(real_rows(alone))


def test_a_shortened_evaluation_takes_long_and_short_rows():
    lengths = list(range(1, 101))
    taken = evaluation_batches(lengths, 5, 1, 0, max_batches=4)
    means = [sum(lengths[row] for row in batch.indices) / 5 for batch in taken]
    assert max(means) > 90 and min(means) < 35


def test_nothing_to_evaluate_is_no_batches_and_nothing_to_train_on_is_an_error():
    assert evaluation_batches([], 4, 2, 1) == []
    with pytest.raises(ValueError):
        StepSampler([], rows_per_micro_batch=1, micro_batches_per_step=1, world_size=1, rank=0, seed=0)


some_tokens = st.integers(1, 2000)


@given(some_lengths, small, small, small, some_tokens, st.integers(0, 5))
def test_a_token_budget_changes_how_a_step_is_cut_and_not_its_rows(
    lengths, rows, micro_batches, world_size, tokens, epoch
):
    by_rows = ranks(lengths, rows, micro_batches, world_size, epoch=epoch)
    by_tokens = ranks(lengths, rows, micro_batches, world_size, epoch=epoch, max_tokens=tokens)
    assert step_rows(by_tokens) == step_rows(by_rows)


@given(some_lengths, small, small, small, some_tokens)
def test_a_token_budget_is_kept_by_equally_many_micro_batches_on_every_rank(
    lengths, rows, micro_batches, world_size, tokens
):
    seen = ranks(lengths, rows, micro_batches, world_size, max_tokens=tokens)
    assert len({tuple(len(step) for step in steps) for steps in seen}) == 1
    for batch in (batch for steps in seen for step in steps for batch in step):
        assert len(batch.indices) == len(batch.real) > 0
        assert padded_tokens([batch], lengths) <= tokens or len(batch.indices) == 1


@given(some_lengths, small, small, some_tokens)
def test_fillers_within_a_token_budget_are_rows_of_their_own_step(lengths, rows, world_size, tokens):
    for steps in zip(*ranks(lengths, rows, 2, world_size, max_tokens=tokens)):
        known = {row for step in steps for row in real_rows(step)}
        assert {row for step in steps for batch in step for row in batch.indices} == known


@given(some_lengths, some_tokens)
def test_a_token_budget_takes_no_more_micro_batches_than_rows_of_one_size_would(lengths, tokens):
    """As many of the longest as the budget holds: what a user would have to choose who counts rows."""
    ((step,),) = ranks(lengths, len(lengths), 1, 1, max_tokens=tokens)
    assert len(step) <= -(-len(lengths) // max(tokens // max(lengths), 1))
    assert padded_tokens(step, lengths) <= max(lengths) * len(lengths)


@pytest.fixture(scope="module")
def real_lengths(hh_data) -> list[int]:
    """About the tokens of real demonstrations, cut to 512."""
    records = read_records(parse_data_path([str(hh_data)]), "demonstration", max_rows=4000, report=ReadReport())
    texts = (
        "".join(message.content for message in sourced.record.prompt.messages) + sourced.record.response
        for sourced in records
    )
    return [min(2 + len(text) // 4, 512) for text in texts]


@pytest.mark.parametrize("world_size, rows, micro_batches", [(2, 16, 1), (2, 4, 4), (4, 16, 1), (8, 16, 1), (8, 8, 8)])
def test_ranks_carry_alike_in_every_step_of_real_rows(real_lengths, world_size, rows, micro_batches):
    seen = ranks(real_lengths, rows, micro_batches, world_size, max_tokens=2048)
    for steps in list(zip(*seen)):
        if sum(step_rows([[step] for step in steps])[0].values()) == world_size * rows * micro_batches:
            carried = [sum(real_lengths[row] for row in real_rows(step)) for step in steps]
            assert max(carried) <= 1.05 * sum(carried) / world_size


def test_little_is_padded_within_a_token_budget(real_lengths):
    """Where one step is all there is to choose from, as in an iteration of PPO."""
    seen = ranks(real_lengths[:128], 64, 1, 2, max_tokens=1024)
    padded = sum(padded_tokens(step, real_lengths) for steps in seen for step in steps)
    assert padded < 1.15 * sum(real_lengths[:128])


@given(st.lists(st.integers(1, 500), max_size=100), small, some_tokens)
def test_passes_within_a_token_budget_see_every_row_once(lengths, world_size, tokens):
    seen = [token_budget_batches(lengths, tokens, world_size, rank) for rank in range(world_size)]
    assert sorted(row for batches in seen for row in real_rows(batches)) == list(range(len(lengths)))
    assert len({len(batches) for batches in seen}) == 1
    assert all(
        padded_tokens([batch], lengths) <= tokens or len(batch.indices) == 1 for batches in seen for batch in batches
    )
