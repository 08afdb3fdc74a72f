"""Where the KL to the reference pulls the policy: exact expectations, in float64, against the KL's own gradient.

The policy is a table: the first token's logits, and for every first token those of the second.
"""

from itertools import product

import pytest
import torch

from step3_ppo.advantages import gae
from step3_ppo.loss import kl_loss_sum, policy_loss_sum
from step3_ppo.options import KL_ESTIMATORS
from step3_ppo.rewards import kl_estimate, token_rewards

TOKENS = 5
SEQUENCES = list(product(range(TOKENS), repeat=2))
NEAR, FAR = 1e-3, 1.0  # distances to the reference
BETA = 0.3
MASK = torch.ones(1, 2, dtype=torch.bool)


def table(seed, around=0.0, distance=1.0):
    noise = torch.randn(1 + TOKENS, TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return around + distance * noise


def log_probs(logits, sequence):
    """(1, 2): of the first token, and of the second after it."""
    first, second = sequence
    everything = logits.log_softmax(-1)
    return torch.stack([everything[0, first], everything[1 + first, second]])[None]


def policies(distance):
    """Logits of the policy, with a gradient, and of the reference."""
    reference = table(0)
    return table(1, reference, distance).requires_grad_(), reference


def expected_gradient(policy, sampled_from, loss_of) -> torch.Tensor:
    """Of the mean loss over all sequences, weighted by their probabilities."""
    total = sum(log_probs(sampled_from, sequence).sum().exp().detach() * loss_of(sequence) for sequence in SEQUENCES)
    return torch.autograd.grad(total, policy)[0].flatten()


def whole_kl_gradient(policy, reference):
    """Of the KL of whole sequences."""
    kl = sum(
        log_probs(policy, sequence).sum().exp() * (log_probs(policy, sequence) - log_probs(reference, sequence)).sum()
        for sequence in SEQUENCES
    )
    return torch.autograd.grad(kl, policy)[0].flatten()


def tokens_kl_gradient(policy, reference, sampled_from):
    """Of the KL of each position's distribution, at what `sampled_from` writes before it."""
    ours, theirs = policy.log_softmax(-1), reference.log_softmax(-1)
    each = (ours.exp() * (ours - theirs)).sum(-1)
    kl = each[0] + (sampled_from.detach().softmax(-1)[0] * each[1:]).sum()
    return torch.autograd.grad(kl, policy)[0].flatten()


def in_reward_gradient(policy, reference, penalty_of):
    """What PPO's first update does with -beta * penalty_of(log pi - log pi_ref) as the reward of each token."""

    def loss_of(sequence):
        now = log_probs(policy, sequence)
        penalty = penalty_of(now.detach() - log_probs(reference, sequence))
        rewards = token_rewards(penalty, torch.zeros(1), MASK, BETA)
        advantages, _ = gae(rewards, torch.zeros(1, 2, dtype=torch.float64), MASK, gamma=1.0, lam=1.0)
        return policy_loss_sum(now, now.detach(), advantages, MASK, clip_range=0.2)[0]

    return expected_gradient(policy, policy, loss_of)


def in_loss_gradient(policy, reference, sampled_from, estimator):
    return expected_gradient(
        policy,
        sampled_from,
        lambda sequence: (
            BETA
            * kl_loss_sum(
                log_probs(policy, sequence),
                log_probs(sampled_from, sequence).detach(),
                log_probs(reference, sequence),
                MASK,
                estimator,
            )[0]
        ),
    )


@pytest.mark.parametrize("distance", [NEAR, FAR])
def test_the_log_ratio_in_the_reward_pulls_with_the_gradient_of_the_kl(distance):
    policy, reference = policies(distance)
    torch.testing.assert_close(
        in_reward_gradient(policy, reference, lambda d: d),
        BETA * whole_kl_gradient(policy, reference),
        rtol=1e-9,
        atol=1e-15,
    )


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_other_estimators_in_the_reward_would_hardly_pull(estimator):
    """Why they are refused there."""
    policy, reference = policies(NEAR)
    penalty = lambda d: kl_estimate(d, torch.zeros_like(d), estimator)
    found, wanted = in_reward_gradient(policy, reference, penalty), BETA * whole_kl_gradient(policy, reference)
    assert found.norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("moved", [False, True], ids=["first-update", "after-updates"])
@pytest.mark.parametrize("distance", [NEAR, FAR])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_every_estimator_in_the_loss_pulls_with_the_gradient_of_the_kl(estimator, distance, moved):
    policy, reference = policies(distance)
    sampled_from = table(2, policy.detach(), 0.3) if moved else policy.detach()
    torch.testing.assert_close(
        in_loss_gradient(policy, reference, sampled_from, estimator),
        BETA * tokens_kl_gradient(policy, reference, sampled_from),
        rtol=1e-9,
        atol=1e-15,
    )


@pytest.mark.parametrize("estimator, exact", [("k1", True), ("k2", False), ("k3", True)])
def test_the_value_of_the_loss_is_the_estimate(estimator, exact):
    policy, reference = policies(FAR)
    sampled_from = table(2, policy.detach(), 0.3)
    ours, theirs = policy.detach().log_softmax(-1)[0], reference.log_softmax(-1)[0]
    kl = float((ours.exp() * (ours - theirs)).sum())
    one = torch.ones(1, 1, dtype=torch.bool)
    total = sum(
        probability
        * kl_loss_sum(ours[token].view(1, 1), probability.log().view(1, 1), theirs[token].view(1, 1), one, estimator)[
            1
        ]["kl_loss"]
        for token, probability in enumerate(sampled_from[0].softmax(-1))
    )
    assert (float(total) == pytest.approx(kl, rel=1e-9)) == exact and float(total) > 0


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_what_is_outside_the_mask_and_far_ratios_leave_finite_gradients(estimator):
    now = torch.tensor([[-90.0, -1.0, float("nan")]], requires_grad=True)
    reference, mask = torch.tensor([[-1.0, -90.0, float("nan")]]), torch.tensor([[True, True, False]])
    loss, _ = kl_loss_sum(now, now.detach(), reference, mask, estimator)
    loss.backward()
    assert loss.isfinite() and now.grad.tolist() == [[-89.0, 89.0, 0.0]]
