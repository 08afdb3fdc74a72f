"""The exact figures of benchmarks/proof/enumeration.py, against the definitions spelt out."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from benchmarks.proof.closed_form import measure
from benchmarks.proof.enumeration import TinyTask, divergence, total_variation

TASK = TinyTask(longest=2)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    model, _ = TASK.write(tmp_path_factory.mktemp("task"))
    return TASK.log_probs(model)


def objective(policy, reference, beta):
    return TASK.expected_reward(policy) - beta * divergence(policy, reference)


def test_the_responses_are_all_there_are(reference):
    assert len(set(TASK.responses)) == len(TASK.responses) == 1 + 3 * 4
    assert reference.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-12)


@pytest.mark.parametrize("beta", (0.2, 1.0))
def test_no_policy_is_better_than_the_optimum(reference, beta):
    optimum = TASK.optimum(reference, beta)
    highest = beta * (reference + TASK.rewards / beta).logsumexp(1).mean()
    assert objective(optimum, reference, beta) == pytest.approx(float(highest), abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 1.0, 10.0) * 20:
        other = (optimum + size * torch.randn(optimum.shape, generator=generator, dtype=torch.float64)).log_softmax(1)
        assert objective(other, reference, beta) < highest


def test_the_optimum_of_the_kl_per_token_has_its_equation_at_every_prefix(reference):
    beta = 0.4
    policy = TASK.optimum_of_token_kl(reference, beta)
    assert policy.exp().sum(1).tolist() == pytest.approx([1, 1], abs=1e-12)
    for own, of_reference, rewards in zip(policy.exp(), reference.exp(), TASK.rewards):
        for length in range(TASK.longest):
            for prefix in {response[:length] for response in TASK.responses if len(response) > length}:
                # A token's share of what follows the prefix, and the mean reward of what follows the token.
                followers = {r[length] for r in TASK.responses if r[:length] == prefix and len(r) > length}
                constants = []
                for token in sorted(followers):
                    after = torch.tensor([r[: length + 1] == (*prefix, token) for r in TASK.responses])
                    here = torch.tensor([r[:length] == prefix for r in TASK.responses])
                    mean_reward = (own * rewards)[after].sum() / own[after].sum()
                    ratio = own[after].sum() / own[here].sum() / (of_reference[after].sum() / of_reference[here].sum())
                    constants.append(float(mean_reward - beta * ratio.log()))
                assert constants == pytest.approx([constants[0]] * len(constants), abs=1e-9)


def test_the_best_of_two_is_the_better_of_every_pair(reference):
    expected = torch.zeros_like(reference)
    for row in range(len(reference)):
        for first, second in product(range(len(TASK.responses)), repeat=2):
            best = max(first, second, key=lambda response: TASK.rewards[row, response])
            expected[row, best] += reference[row, first].exp() * reference[row, second].exp()
    assert torch.allclose(TASK.best_of(reference, 2).exp(), expected, atol=1e-12)


def test_the_frontier_is_where_the_optimum_is_and_above_the_best_of_n(reference):
    for beta in (0.2, 0.5, 2.0):
        optimum = TASK.optimum(reference, beta)
        assert TASK.frontier(reference, divergence(optimum, reference)) == pytest.approx(TASK.expected_reward(optimum))
    for n in (2, 4, 8):
        best = TASK.best_of(reference, n)
        assert TASK.frontier(reference, divergence(best, reference)) > TASK.expected_reward(best)


def test_only_the_optimum_has_reached_it(reference):
    optimum = TASK.optimum(reference, 0.5)
    assert measure(TASK, optimum, reference, optimum).reached
    for other in (reference, TASK.optimum(reference, 0.6), TASK.optimum(reference, 0.45), TASK.best_of(reference, 4)):
        assert not measure(TASK, other, reference, optimum).reached
    assert total_variation(optimum, optimum) == 0 and divergence(reference, reference) == 0
