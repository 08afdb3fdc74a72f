"""REINFORCE leave-one-out against its definition, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.logprobs import length_mask
from step3_ppo.advantages import ESTIMATORS, leave_one_out
from tests.iterations import iterations


def per_response(advantages, mask):
    """The one number that all tokens of each response have; nothing stands outside the mask."""
    assert not advantages[~mask].any()
    for row, inside in zip(advantages, mask):
        assert (row[inside] == row[0]).all()
    return advantages[:, 0]


@settings(deadline=None)
@given(iterations())
def test_is_the_reward_less_the_mean_of_the_others(iteration):
    rewards, mask, groups = iteration
    found = per_response(leave_one_out(*iteration), mask).tolist()
    totals = [sum(row[inside].tolist()) for row, inside in zip(rewards, mask)]
    for row, group in enumerate(groups.tolist()):
        others = [totals[other] for other in range(len(totals)) if groups[other] == group and other != row]
        assert found[row] == pytest.approx(totals[row] - sum(others) / len(others), abs=1e-12)


@settings(deadline=None)
@given(iterations(), st.floats(-1e3, 1e3))
def test_a_group_sums_to_zero_and_does_not_feel_a_constant(iteration, constant):
    rewards, mask, groups = iteration
    advantages = per_response(leave_one_out(rewards, mask, groups), mask)
    for group in groups.unique():
        assert abs(float(advantages[groups == group].sum())) < 1e-12
    shifted = rewards.clone()
    shifted[groups == groups[0], 0] += constant
    torch.testing.assert_close(per_response(leave_one_out(shifted, mask, groups), mask), advantages, rtol=0, atol=1e-9)


@settings(deadline=None)
@given(iterations(), st.randoms())
def test_neither_the_order_of_responses_nor_the_numbers_of_groups_matter(iteration, random):
    rewards, mask, groups = iteration
    order = torch.tensor(random.sample(range(len(groups)), len(groups)))
    found = leave_one_out(rewards[order], mask[order], 1000 - 7 * groups[order])
    torch.testing.assert_close(found, leave_one_out(*iteration)[order], rtol=0, atol=1e-12)


def test_what_lies_outside_the_mask_changes_nothing():
    mask = length_mask(torch.tensor([1, 3, 2]), 3)
    rewards = torch.arange(9.0).view(3, 3)
    groups = torch.tensor([4, 4, 4])
    spoilt = rewards.masked_fill(~mask, torch.nan)
    assert torch.equal(leave_one_out(spoilt, mask, groups), leave_one_out(rewards, mask, groups))


def test_a_response_without_others_is_refused():
    with pytest.raises(ValueError, match="two responses or more"):
        leave_one_out(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), torch.tensor([1, 1, 2]))


def test_the_estimator_has_no_returns():
    rewards, mask = torch.randn(4, 3), torch.ones(4, 3, dtype=torch.bool)
    groups = torch.tensor([0, 0, 1, 1])
    advantages, returns = ESTIMATORS["rloo"](rewards, None, mask, groups, None)
    assert returns is None and torch.equal(advantages, leave_one_out(rewards, mask, groups))
