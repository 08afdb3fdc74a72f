"""Sets of tokens in their compact forms: what was packed comes back, and takes little memory."""

import pytest
import torch

from common.models.token_sets import BITS, IDS, OTHERS, TokenSets, places_within

EMPTY = torch.empty(0, 0, dtype=torch.bool)


def members(vocabulary, sizes):
    """Random sets of these sizes."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(len(sizes), vocabulary, generator=generator).argsort(1)
    return order < torch.tensor(sizes)[:, None]


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 64, 1000])
def test_sets_of_every_size_come_back(vocabulary):
    sizes = sorted({0, 1, 2, vocabulary // 2, vocabulary - 1, vocabulary} & set(range(vocabulary + 1)))
    sets = members(vocabulary, sizes)
    assert torch.equal(TokenSets.pack(sets).members(), sets)


def test_each_set_takes_the_smallest_form():
    packed = TokenSets.pack(members(1000, [3, 500, 998, 1000, 0]))
    assert packed.forms.tolist() == [IDS, BITS, OTHERS, OTHERS, IDS]
    assert packed.sizes.tolist() == [3, 32, 2, 0, 0] and len(packed.words) == 37


def test_no_set_takes_more_than_a_bit_per_token():
    packed = TokenSets.pack(members(50_272, list(range(0, 50_272, 2_000))))
    assert packed.sizes.max() * 4 <= 50_272 / 8
    largest = TokenSets.largest(3, 50_272)
    assert largest.members().all() and len(largest.words) == 3 * 50_272 / 32


def test_selection_split_and_concatenation_keep_every_set():
    sets = members(100, [3, 50, 98, 100, 0, 49, 1])
    packed = TokenSets.pack(sets)
    rows = torch.tensor([6, 1, 1, 4, 2])
    assert torch.equal(packed.select(rows).members(), sets[rows])
    parts = packed.split(3)
    assert [len(part) for part in parts] == [3, 3, 1]
    for part, expected in zip(parts, sets.split(3)):
        assert torch.equal(part.members(), expected)
    assert torch.equal(TokenSets.concat([TokenSets.pack(EMPTY), *parts]).members(), sets)
    none = packed.select(torch.empty(0, dtype=torch.long))
    assert len(none) == 0 and none.members().shape == (0, 100)


def test_places_are_those_of_the_wanted_items():
    sizes, items = torch.tensor([2, 0, 3, 1]), torch.tensor([2, 1, 0, 2])
    assert places_within(sizes, items).tolist() == [2, 3, 4, 0, 1, 2, 3, 4]
