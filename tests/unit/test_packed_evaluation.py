"""Evaluation batches whose rows share sequences."""

import pytest

from common.batching.sampler import evaluation_batches

LENGTHS = [3, 9, 5, 5, 2, 8, 1, 7, 6, 4, 9]


def of_ranks(ranks, **settings):
    return [evaluation_batches(LENGTHS, 2, ranks, rank, pack_to=10, **settings) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_counts_once_and_no_sequence_is_too_long(ranks):
    shares = of_ranks(ranks)
    assert len({len(share) for share in shares}) == 1
    counted = []
    for batch in (batch for share in shares for batch in share):
        assert sum(batch.packs) == len(batch.indices) and 1 <= len(batch.packs) <= 2
        rest = list(batch.indices)
        for pack in batch.packs:
            assert sum(LENGTHS[row] for row in rest[:pack]) <= 10
            rest = rest[pack:]
        counted += [row for row, real in zip(batch.indices, batch.real) if real]
    assert sorted(counted) == list(range(len(LENGTHS)))


def test_a_part_of_the_batches_is_the_same_on_any_number_of_ranks():
    one, two = ([batch for share in of_ranks(ranks, max_batches=2) for batch in share] for ranks in (1, 2))
    assert one == two and len(one) == 2
