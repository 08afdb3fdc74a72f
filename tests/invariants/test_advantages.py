"""Every advantage estimator, with the normalisation that belongs to it, against its definition in float64."""

from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_ppo.advantages import ESTIMATORS, group_relative, length_adaptive_lambda
from step3_ppo.config import PPOConfig
from step3_ppo.whitening import whiten
from tests.iterations import iterations

NAMES = ("gae", "rloo", "grpo", "dr_grpo", "reinforce++", "reinforce++_baseline")
COMPARING = ("rloo", "grpo", "dr_grpo", "reinforce++_baseline")


def config_of(name, **options):
    return PPOConfig(advantage=name, answers_per_prompt=2, **options)


def values_like(rewards):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rewards.shape, generator=generator, dtype=torch.float64)


def estimated(config, rewards, mask, groups, values=None):
    """What the update gets of the estimator: the advantages, whitened where that belongs to it."""
    advantages, _ = config.estimator(rewards, values, mask, groups, config)
    return whiten(advantages, mask) if config.whitens else advantages


def discounted(terms, discount):
    return sum(discount**k * term for k, term in enumerate(terms))


def by_definition(config, rewards, mask, groups, values):
    """Rows of the advantages of the tokens inside of the mask."""
    rows = [row[inside].tolist() for row, inside in zip(rewards, mask)]
    totals = [sum(row) for row in rows]
    found = []
    for number, row in enumerate(rows):
        group = [total for other, total in enumerate(totals) if groups[other] == groups[number]]
        others = [t for other, t in enumerate(totals) if groups[other] == groups[number] and other != number]
        match config.advantage:
            case "gae":
                value = [*values[number][mask[number]].tolist(), 0.0]
                errors = [reward + config.gamma * value[t + 1] - value[t] for t, reward in enumerate(row)]
                found.append([discounted(errors[t:], config.gamma * config.gae_lambda) for t in range(len(row))])
            case "rloo":
                found.append([totals[number] - fmean(others)] * len(row))
            case "grpo":
                found.append([(totals[number] - fmean(group)) / (stdev(group) + 1e-6)] * len(row))
            case "dr_grpo" | "reinforce++_baseline":
                found.append([totals[number] - fmean(group)] * len(row))
            case "reinforce++":
                found.append([discounted(row[t:], config.gamma) for t in range(len(row))])
    if config.advantage in ("grpo", "dr_grpo"):
        return found
    tokens = [advantage for row in found for advantage in row]
    mean = fmean(tokens)
    deviation = (fmean([(token - mean) ** 2 for token in tokens]) + 1e-8) ** 0.5
    return [[(advantage - mean) / deviation for advantage in row] for row in found]


def test_these_are_all():
    assert set(NAMES) == set(ESTIMATORS)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=50)
@given(iteration=iterations(), gamma=st.sampled_from([1.0, 0.9]))
def test_equals_its_definition(name, iteration, gamma):
    rewards, mask, groups = iteration
    config, values = config_of(name, gamma=gamma), values_like(rewards)
    found = estimated(config, *iteration, values=values if name == "gae" else None)
    expected = by_definition(config, *iteration, values)
    assert not found[~mask].any()
    for row, inside, wanted in zip(found, mask, expected):
        assert row[inside].tolist() == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(iteration=iterations(), random=st.randoms())
def test_neither_the_order_of_responses_nor_the_numbers_of_groups_matter(name, iteration, random):
    """So it does not matter either which rank made which responses of a group."""
    rewards, mask, groups = iteration
    config, values = config_of(name), values_like(rewards)
    order = torch.tensor(random.sample(range(len(groups)), len(groups)))
    found = estimated(config, rewards[order], mask[order], 1000 - 7 * groups[order], values[order])
    torch.testing.assert_close(found, estimated(config, *iteration, values)[order], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(iteration=iterations())
def test_what_lies_outside_the_mask_changes_nothing(name, iteration):
    rewards, mask, groups = iteration
    config, values = config_of(name), values_like(rewards)
    spoilt = [tensor.masked_fill(~mask, torch.nan) for tensor in (rewards, values)]
    found = estimated(config, spoilt[0], mask, groups, spoilt[1])
    assert torch.equal(found, estimated(config, rewards, mask, groups, values))


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("answers", [2, 3, 7])
def test_equal_rewards_in_float32_teach_nothing(name, answers):
    """The rounding of their mean must not be taken for a difference, however it is scaled up."""
    rewards = torch.tensor([[4.9173]] * answers + [[0.1], [0.3]])
    groups = torch.tensor([0] * answers + [1, 1])
    config = config_of(name, whiten_advantages=False)
    advantages = estimated(config, rewards, torch.ones_like(rewards, dtype=torch.bool), groups)
    assert advantages[:answers].abs().max() < 1e-6 < advantages[answers:].abs().min()


@settings(deadline=None, max_examples=25)
@given(iterations(), st.floats(0.1, 1e3), st.floats(-1e3, 1e3))
def test_grpo_does_not_feel_the_scale_or_the_place_of_a_groups_rewards(iteration, scale, shift):
    rewards, mask, groups = iteration
    moved = rewards * torch.where(groups == groups[0], scale, 1.0)[:, None]
    moved[groups == groups[0], 0] += shift
    found = group_relative(moved, mask, groups, divide_by_std=True)
    expected = group_relative(rewards, mask, groups, divide_by_std=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", COMPARING)
def test_a_response_without_others_is_refused(name):
    config = config_of(name)
    with pytest.raises(ValueError, match="two responses or more"):
        config.estimator(torch.zeros(3, 2), None, torch.ones(3, 2, dtype=torch.bool), torch.tensor([1, 1, 2]), config)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gae"])
def test_without_a_critic_there_are_no_returns(name):
    config = config_of(name)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert config.estimator(torch.randn(2, 3), None, mask, torch.tensor([5, 5]), config)[1] is None


def double_sum(rewards, values, gamma, lam):
    """GAE of one response as the sum over k of (gamma lam)^k delta_{t+k}."""
    values = [*values, 0.0]
    errors = [reward + gamma * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    return [discounted(errors[t:], gamma * lam) for t in range(len(rewards))]


@settings(deadline=None, max_examples=50)
@given(
    iteration=iterations(),
    alpha=st.sampled_from([None, 0.05, 0.5, 2.0]),
    critic=st.sampled_from([None, 0.0, 1.0]),
)
def test_the_lambdas_of_actor_and_critic(iteration, alpha, critic):
    rewards, mask, groups = iteration
    values = values_like(rewards)
    config = config_of("gae", gamma=0.97, gae_lambda=0.8, gae_lambda_alpha=alpha, critic_gae_lambda=critic)
    advantages, returns = config.estimator(rewards, values, mask, groups, config)
    for row, inside in enumerate(mask):
        numbers = rewards[row][inside].tolist(), values[row][inside].tolist()
        length = len(numbers[0])
        lam = 0.8 if alpha is None else max(0.0, 1 - 1 / (alpha * length))
        expected = double_sum(*numbers, 0.97, lam)
        assert advantages[row][inside].tolist() == pytest.approx(expected, abs=1e-12)
        targets = double_sum(*numbers, 0.97, lam if critic is None else critic)
        assert (returns - values)[row][inside].tolist() == pytest.approx(targets, abs=1e-12)
        assert not advantages[row][~inside].any() and not returns[row][~inside].any()


def test_the_weights_of_an_adaptive_lambda_add_up_in_proportion_to_the_length():
    mask = torch.arange(400)[None] < torch.tensor([[100], [200], [400]])
    for lam, length in zip(length_adaptive_lambda(mask, 0.05).tolist(), (100, 200, 400)):
        assert sum(lam**k for k in range(10_000)) == pytest.approx(0.05 * length)
