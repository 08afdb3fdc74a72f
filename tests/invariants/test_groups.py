"""Groups of equal scores are left out and replaced, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_ppo.combined import RewardScores
from step3_ppo.config import PPOConfig
from step3_ppo.generation.rollout import Rollout
from step3_ppo.groups import (
    Responses,
    equal_fraction,
    in_equal_group,
    refill_batches,
    refill_prompts,
    refilled,
)
from step3_ppo.scoring import ModelOutputs

ANSWERS = 3


@st.composite
def scored_groups(draw):
    """Scores of few values, and the group of each; groups of any size in any order."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    groups = draw(st.permutations([7 * group + 3 for group, size in enumerate(sizes) for _ in range(size)]))
    scores = draw(st.lists(st.sampled_from([-1e5, -1.0, 0.0, 0.5, 1.0]), min_size=len(groups), max_size=len(groups)))
    return torch.tensor(scores), torch.tensor(groups)


@settings(deadline=None)
@given(scored_groups())
def test_a_group_is_equal_if_any_two_of_its_scores_are(case):
    scores, groups = case
    pairs = combinations(range(len(scores)), 2)
    unequal = {int(groups[a]) for a, b in pairs if groups[a] == groups[b] and scores[a] != scores[b]}
    expected = [int(group) not in unequal for group in groups]
    rollout = distinct(groups)
    assert in_equal_group(rollout, scores).tolist() == expected
    assert equal_fraction(rollout, scores) == pytest.approx(1 - len(unequal) / len(set(groups.tolist())))


@pytest.mark.parametrize("score", [0.0, 1.0, -3e4])
def test_rounding_makes_no_difference_and_more_does(score):
    step = 1e-7 * max(1.0, abs(score))
    rollout = distinct(torch.zeros(2, dtype=torch.long))
    assert in_equal_group(rollout, torch.tensor([score, score + step])).all()
    assert not in_equal_group(rollout, torch.tensor([score, score + 100 * step])).any()


def test_the_same_response_has_the_same_score_whatever_rounding_says_and_whatever_pads():
    whole = distinct(torch.tensor([4, 4, 5, 5]))
    tokens = torch.tensor([[4, 1, 2, 9], [4, 1, 2, 7], [5, 1, 2, 3], [5, 1, 2, 2]])
    lengths = torch.tensor([2, 2, 2, 3])
    rollout = replace(whole, tokens=tokens, response_lengths=lengths)
    assert in_equal_group(rollout, torch.tensor([0.5, 0.51, 0.5, 0.51])).tolist() == [True, True, False, False]


def test_the_same_response_to_another_row_has_a_score_of_its_own():
    """Rows with the same prompt and other columns stay apart, and a function may judge them otherwise."""
    whole = distinct(torch.tensor([0, 0, 1, 1]))
    rollout = replace(whole, tokens=torch.tensor([[4, 1], [4, 2], [4, 1], [4, 2]]))
    assert in_equal_group(rollout, torch.tensor([0.0, 0.0, 0.0, 1.0])).tolist() == [True, True, False, False]


def test_a_group_of_several_rewards_is_equal_only_if_each_of_them_is():
    """Normalised by itself each reward weighs otherwise than raw, so the order of the responses may show again."""
    rollout = distinct(torch.tensor([0, 0, 1, 1, 2, 2]))
    raw = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 3.0], [1.0, 3.0], [0.0, 1.0], [0.0, 1.0]])
    failed = torch.tensor([[False, False]] * 5 + [[True, False]])
    by_reward = RewardScores(("a", "b"), torch.ones(2), raw, failed, {})
    outputs = ModelOutputs(*torch.zeros(3, 6, 1), None, by_reward.total, by_reward)
    equal = in_equal_group(rollout, outputs.scores_to_compare())
    assert equal.tolist() == [False, False, True, True, False, False]


def distinct(groups: torch.Tensor) -> Rollout:
    """Responses to the prompts of these numbers, each of one token of its own."""
    rows = len(groups)
    ones = torch.ones(rows, dtype=torch.long)
    tokens = torch.stack([groups, torch.arange(rows)], 1)
    return Rollout(tokens, ones, ones, ones.bool(), groups, ones.bool(), ones)


def responses(prompts: list[int], equal) -> Responses:
    """To each prompt `ANSWERS` of lengths that tell it apart, sorted by prompt as all rollouts are; `equal` says of a
    prompt whether their scores are."""
    index = torch.tensor(sorted(prompts)).repeat_interleave(ANSWERS)
    sample = torch.arange(len(index)) % ANSWERS
    lengths = 1 + index % 4
    rows, width = len(index), int(lengths.max())
    rollout = Rollout(
        (ANSWERS * index + sample)[:, None].expand(rows, width + 1).clone(),
        torch.ones(rows, dtype=torch.long),
        lengths,
        torch.ones(rows, dtype=torch.bool),
        index,
        torch.ones(rows, dtype=torch.bool),
        torch.zeros(rows, dtype=torch.long),
    )
    numbers = rollout.response_mask * (10.0 * index + sample)[:, None]
    scores = torch.tensor([float(prompt if equal(prompt) else prompt + k) for prompt, k in zip(index.tolist(), sample)])
    return Responses(rollout, ModelOutputs(numbers, -numbers, numbers + 1, None, scores))


@st.composite
def iterations(draw):
    prompts = draw(st.integers(1, 12))
    first = draw(st.lists(st.integers(0, prompts - 1), min_size=1, max_size=prompts, unique=True))
    equal = draw(st.sets(st.integers(0, prompts - 1)))
    return prompts, first, equal, draw(st.integers(0, 4)), draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 9))


@settings(deadline=None)
@given(iterations())
def test_refills_make_the_batch_as_full_as_the_limit_and_the_prompts_allow(iteration):
    prompts, first, equal, max_refills, seed, number = iteration
    asked: list[list[int]] = []

    def respond(rows: list[int]) -> Responses:
        asked.append(rows)
        return responses(rows, equal.__contains__)

    def run():
        config = PPOConfig(drop_equal_groups=True, answers_per_prompt=ANSWERS, max_refills=max_refills, seed=seed)
        return refilled(respond(first), respond, prompts, number, config)

    made, chosen = run()
    drawn = [prompt for rows in [sorted(first), *asked[1:]] for prompt in rows]
    assert len(set(drawn)) == len(drawn)  # the keys of random numbers do not collide
    assert len(asked) - 1 <= max_refills
    assert sorted(made.rollout.prompt_index.tolist()) == sorted(prompt for prompt in drawn for _ in range(ANSWERS))
    expected = [prompt for prompt in drawn if prompt not in equal][: len(first)]
    learnt = made.rollout.prompt_index[chosen].tolist()
    assert learnt == [prompt for prompt in expected for _ in range(ANSWERS)]
    if len(expected) < len(first):  # only because no more was allowed, or there was no more
        assert len(asked) - 1 == max_refills or len(drawn) == prompts
    # Each row is still what it was.
    index = made.rollout.prompt_index
    for tensor in (made.outputs.old_log_probs, -made.outputs.ref_log_probs):
        assert torch.equal(tensor[:, 0], 10.0 * index + torch.arange(len(index)) % ANSWERS)
        assert torch.equal(tensor != 0, made.rollout.response_mask & (tensor[:, :1] != 0))
    again, also_chosen = run()
    assert torch.equal(again.rollout.prompt_index, index) and torch.equal(also_chosen, chosen)


def test_a_selection_of_responses_has_all_their_numbers():
    whole = responses([4, 1, 2, 7], lambda prompt: False)
    part = whole.select([6, 0])
    assert part.rollout.prompt_index.tolist() == [4, 1]
    width = part.rollout.response_mask.shape[1]
    for name in ("old_log_probs", "ref_log_probs", "entropy"):
        assert torch.equal(getattr(part.outputs, name), getattr(whole.outputs, name)[[6, 0], :width])
    assert part.outputs.values is None and part.outputs.scores.tolist() == whole.outputs.scores[[6, 0]].tolist()


def test_every_refill_has_an_order_of_its_own_and_no_prompt_twice():
    orders = [tuple(refill_prompts(1, iteration, refill, 50, {3, 4})) for iteration in range(3) for refill in range(3)]
    assert len(set(orders)) == len(orders)
    assert all(sorted(order) == [row for row in range(50) if row not in (3, 4)] for order in orders)
    # Not the order of an epoch either: that would bring the very prompts of the next iteration.
    assert orders[0] != tuple(row for row in np.random.default_rng([1, 0]).permutation(50) if row not in (3, 4))


@pytest.mark.parametrize("prompts", range(1, 8))
@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_ranks_divide_a_refill(prompts, ranks):
    rows, lengths = [10 * number + 1 for number in range(prompts)], list(range(prompts))
    shares = [refill_batches(rows, lengths, 2, ranks, rank) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # ranks stay in step
    real = [row for share in shares for batch in share for row, is_real in zip(batch.indices, batch.real) if is_real]
    assert sorted(real) == rows
    assert all(row in rows for share in shares for batch in share for row in batch.indices)
