"""The pairwise loss of the reward model, and the calibration of its scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.training.metrics import add_sums, means
from step2_reward.loss import bradley_terry_loss_sum, score_mean_and_std

scores = st.floats(-50, 50)


def pairs(seed=0, count=7):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return chosen, rejected, torch.ones(count, dtype=torch.bool)


def loss_of(chosen, rejected, **options):
    as_tensor = [torch.tensor([score], dtype=torch.float64) for score in (chosen, rejected)]
    return bradley_terry_loss_sum(*as_tensor, torch.tensor([True]), **options)[0].item()


@settings(max_examples=100, deadline=None)
@given(scores, scores, scores)
def test_only_the_difference_of_the_scores_counts(chosen, rejected, shift):
    assert loss_of(chosen + shift, rejected + shift) == pytest.approx(loss_of(chosen, rejected), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(scores, scores)
def test_either_order_of_a_pair_is_preferred_with_probabilities_that_add_up_to_one(a, b):
    assert math.exp(-loss_of(a, b)) + math.exp(-loss_of(b, a)) == pytest.approx(1.0)


@settings(max_examples=100, deadline=None)
@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 5), st.floats(0.01, 5))
def test_a_larger_margin_costs_more(chosen, rejected, margin, more):
    assert loss_of(chosen, rejected, margin=margin + more) > loss_of(chosen, rejected, margin=margin)


def test_a_margin_per_pair_is_that_of_each_pair():
    chosen, rejected, real = pairs()
    margins = torch.linspace(0, 3, len(chosen), dtype=torch.float64)
    whole, _ = bradley_terry_loss_sum(chosen, rejected, real, margin=margins)
    alone = [loss_of(c.item(), r.item(), margin=m.item()) for c, r, m in zip(chosen, rejected, margins)]
    assert whole.item() == pytest.approx(sum(alone))


@settings(max_examples=100, deadline=None)
@given(scores, scores, st.floats(0.01, 1))
def test_centring_is_free_exactly_for_opposite_scores(chosen, rejected, centring):
    assert loss_of(chosen, -chosen, centring=centring) == pytest.approx(loss_of(chosen, -chosen))
    if abs(chosen + rejected) > 1e-3:
        assert loss_of(chosen, rejected, centring=centring) > loss_of(chosen, rejected)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_alike():
    chosen, rejected, real = pairs()
    chosen.requires_grad_(), rejected.requires_grad_()
    bradley_terry_loss_sum(chosen, rejected, real, margin=0.5)[0].backward()
    assert (chosen.grad < 0).all() and torch.allclose(chosen.grad, -rejected.grad)


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6), (3,)])
def test_micro_batches_add_up_to_the_whole(cuts):
    batch = pairs()
    loss, sums = bradley_terry_loss_sum(*batch, margin=0.3, centring=0.01)
    cut = zip(*(tensor.tensor_split(cuts) for tensor in batch))
    parts = [bradley_terry_loss_sum(*part, margin=0.3, centring=0.01) for part in cut]
    assert sum(part[0].item() for part in parts) == pytest.approx(loss.item())
    merged = add_sums([part[1] for part in parts])
    assert all(merged[name].item() == pytest.approx(sums[name].item()) for name in sums)


def test_fillers_count_nothing_whatever_their_scores():
    chosen, rejected, real = pairs()
    expected, expected_sums = bradley_terry_loss_sum(chosen, rejected, real, centring=0.1)
    filler = torch.tensor([torch.nan], dtype=torch.float64)
    chosen = torch.cat([chosen, filler]).requires_grad_()
    loss, sums = bradley_terry_loss_sum(
        chosen, torch.cat([rejected, filler]), torch.cat([real, torch.tensor([False])]), centring=0.1
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected.item())
    assert all(sums[name].item() == pytest.approx(expected_sums[name].item()) for name in sums)
    assert chosen.grad.isfinite().all() and chosen.grad[-1] == 0


def test_accuracy_of_the_swapped_pairs_is_the_complement_and_a_tie_a_half():
    chosen, rejected, real = pairs()
    rejected[0] = chosen[0]
    forth = means(bradley_terry_loss_sum(chosen, rejected, real)[1], "pairs")
    back = means(bradley_terry_loss_sum(rejected, chosen, real)[1], "pairs")
    assert forth["accuracy"] + back["accuracy"] == pytest.approx(1.0)
    assert forth["margin"] == pytest.approx(-back["margin"])
    assert forth["accuracy"] == pytest.approx(((chosen > rejected).sum().item() + 0.5) / len(chosen))


def test_calibration_normalises_the_scores_it_was_taken_from():
    chosen, rejected, real = pairs(count=50)
    sums = bradley_terry_loss_sum(3 * chosen + 9.7, 3 * rejected + 9.7, real)[1]
    mean, std = score_mean_and_std(sums)
    normalised = (torch.cat([3 * chosen, 3 * rejected]) + 9.7 - mean) / std
    assert abs(normalised.mean()) < 1e-9 and normalised.std(unbiased=False).item() == pytest.approx(1.0)


def test_half_precision_scores_lose_nothing_more():
    chosen, rejected, real = pairs()
    rounded = [chosen.bfloat16(), rejected.bfloat16()]
    loss, _ = bradley_terry_loss_sum(*rounded, real)
    assert loss.dtype == torch.float32
    exact, _ = bradley_terry_loss_sum(*[score.double() for score in rounded], real)
    assert loss.item() == pytest.approx(exact.item())
