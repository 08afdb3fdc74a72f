"""Generalised advantage estimation: its definition and its properties."""

import pytest
import torch

from common.models.logprobs import length_mask
from step3_ppo.advantages import gae


def by_definition(rewards, values, length, gamma, lam):
    """The double sum over k of (gamma lam)^k delta_{t+k}, for one response and in float64."""
    advantages = []
    for t in range(length):
        total = 0.0
        for k in range(length - t):
            next_value = values[t + k + 1] if t + k + 1 < length else 0.0
            total += (gamma * lam) ** k * (rewards[t + k] + gamma * next_value - values[t + k])
        advantages.append(total)
    return advantages


def batch(seed, rows=6, width=17):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    lengths[0] = width
    return rewards, values, lengths


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_equals_the_double_sum_of_the_definition(seed, gamma, lam):
    rewards, values, lengths = batch(seed)
    mask = length_mask(lengths, rewards.shape[1])
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths.tolist()):
        expected = by_definition(rewards[row].tolist(), values[row].tolist(), length, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert torch.allclose((returns - values)[row, :length], advantages[row, :length], atol=1e-12)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_without_discount_the_returns_are_the_rewards_still_to_come():
    rewards, values, lengths = batch(7)
    mask = length_mask(lengths, rewards.shape[1])
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            assert returns[row, t].item() == pytest.approx(rewards[row, t:length].sum().item(), abs=1e-12)


def test_a_perfect_critic_leaves_no_advantage():
    rewards, _, lengths = batch(3)
    mask = length_mask(lengths, rewards.shape[1])
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, gamma=0.9, lam=1.0)
    advantages, _ = gae(rewards, returns, mask, gamma=0.9, lam=0.5)
    assert advantages.abs().max() < 1e-12


def test_what_lies_outside_the_mask_changes_nothing():
    rewards, values, lengths = batch(11)
    mask = length_mask(lengths, rewards.shape[1])
    expected = gae(rewards, values, mask, gamma=0.99, lam=0.95)
    garbage = torch.where(torch.arange(mask.shape[1]) % 2 == 0, torch.nan, torch.inf).double()
    found = gae(rewards.where(mask, garbage), values.where(mask, garbage), mask, gamma=0.99, lam=0.95)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
