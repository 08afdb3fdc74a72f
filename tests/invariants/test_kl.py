"""The KL estimators k1, k2 and k3 against exact divergences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step3_ppo.options import KL_ESTIMATORS
from step3_ppo.rewards import kl_estimate

log_probabilities = st.floats(min_value=-200.0, max_value=0.0, width=32)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(log_probabilities, log_probabilities), min_size=1, max_size=20))
def test_k2_and_k3_are_never_negative_nor_infinite(pairs):
    p, q = torch.tensor(pairs).unbind(1)
    for estimator in ("k2", "k3"):
        estimate = kl_estimate(p, q, estimator)
        assert (estimate >= 0).all() and estimate.isfinite().all()


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e-4, 1e-4))
def test_k3_is_never_negative_where_rounding_rules(d):
    assert kl_estimate(torch.tensor(d), torch.tensor(0.0), "k3") >= 0


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_equal_policies_have_no_divergence(estimator):
    log_probs = torch.randn(4, 5)
    assert not kl_estimate(log_probs, log_probs, estimator).any()


def policies(distance):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64)
    other = logits + distance * torch.randn(7, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1), other.log_softmax(-1)


@pytest.mark.parametrize("distance", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_converge_to_the_exact_divergence(estimator, distance):
    p, q = policies(distance)
    exact = sum(p[token].exp().item() * (p[token] - q[token]).item() for token in range(len(p)))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    estimates = kl_estimate(p[tokens], q[tokens], estimator)
    standard_error = estimates.std().item() / len(estimates) ** 0.5
    assert abs(estimates.mean().item() - exact) < 4 * standard_error
    assert standard_error < 0.1 * exact


def test_k2_nears_the_exact_divergence_of_close_policies():
    p, q = policies(0.02)
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * kl_estimate(p, q, "k2")).sum().item() == pytest.approx(exact.item(), rel=0.05)


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
