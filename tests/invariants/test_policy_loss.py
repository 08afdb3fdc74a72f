"""The clipped policy and value losses, and their gradients."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.models.logprobs import length_mask, response_log_probs
from common.training.metrics import add_sums, means
from step3_ppo.loss import explained_variance, explained_variance_sums, policy_loss_sum, value_loss_sum
from tests.given_logits import GivenLogits


def aligned_batch(rows=8, width=6, seed=0):
    """(log_probs, old_log_probs, advantages, mask), far enough apart for some tokens to be clipped."""
    generator = torch.Generator().manual_seed(seed)
    log_probs, old, advantages = torch.randn(3, rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return -log_probs.abs(), -old.abs(), advantages, length_mask(lengths, width)


def gradient_of(loss_sum, first, *rest):
    first = first.clone().requires_grad_()
    loss, sums = loss_sum(first, *rest)
    loss.backward()
    return first.grad, loss.detach(), sums


def test_at_equal_policies_the_gradient_is_that_of_reinforce():
    torch.manual_seed(0)
    prompt_lengths, response_lengths = torch.tensor([3, 1, 2]), torch.tensor([2, 4, 1])
    tokens = torch.randint(0, 9, (3, 5))
    advantages = torch.randn(3, 4, dtype=torch.float64)
    embedding = torch.randn(9, 4, dtype=torch.float64)
    weights = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)

    reinforce = torch.zeros_like(weights)
    for row in range(3):
        for t in range(response_lengths[row]):
            position = prompt_lengths[row] + t
            log_p = (embedding[tokens[row, position - 1]] @ weights).log_softmax(-1)[tokens[row, position]]
            reinforce -= advantages[row, t] * torch.autograd.grad(log_p, weights)[0]

    policy = GivenLogits(embedding[tokens] @ weights)
    log_probs = response_log_probs(policy, {"input_ids": tokens}, prompt_lengths, response_lengths)
    mask = length_mask(response_lengths, 4)
    loss, sums = policy_loss_sum(log_probs, log_probs.detach(), advantages, mask, 0.2)
    loss.backward()
    assert torch.allclose(weights.grad, reinforce, atol=1e-12)
    assert sums["clip_fraction"] == 0 and sums["approx_kl"] == 0


@settings(max_examples=200, deadline=None)
@given(
    log_ratio=st.floats(-3, 3),
    advantage=st.floats(-5, 5).filter(lambda a: abs(a) > 1e-3),
    clip_range=st.sampled_from([0.1, 0.2, 0.4]),
)
def test_clipping_blocks_the_gradient_exactly_where_enough_is_gained(log_ratio, advantage, clip_range):
    ratio = torch.tensor(log_ratio, dtype=torch.float64).exp().item()
    assume(min(abs(ratio - 1 - clip_range), abs(ratio - 1 + clip_range)) > 1e-6)
    tensors = [torch.tensor([[x]], dtype=torch.float64) for x in (log_ratio - 4.0, -4.0, advantage)]
    gradient, _, sums = gradient_of(policy_loss_sum, *tensors, torch.tensor([[True]]), clip_range)
    gained_enough = ratio > 1 + clip_range if advantage > 0 else ratio < 1 - clip_range
    assert (gradient.item() == 0) == gained_enough
    assert sums["clip_fraction"].item() == gained_enough
    if not gained_enough:  # the step goes the advantage's way
        assert gradient.item() * advantage < 0


def test_the_loss_is_never_below_the_unclipped_surrogate():
    log_probs, old, advantages, mask = aligned_batch()
    clipped, _ = policy_loss_sum(log_probs, old, advantages, mask, 0.2)
    unclipped, _ = policy_loss_sum(log_probs, old, advantages, mask, 1e9)
    assert clipped > unclipped


def test_an_absurd_ratio_stays_finite():
    far, advantages = torch.tensor([[-1.0, -500.0]]), torch.tensor([[-1.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    gradient, loss, sums = gradient_of(policy_loss_sum, far, far.flip(1), advantages, mask, 0.2)
    assert gradient.isfinite().all() and loss.isfinite() and sums["approx_kl"].isfinite()


def test_the_approximate_kl_is_that_of_the_old_policy_to_the_new():
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    tokens = torch.multinomial(old.exp(), 100_000, replacement=True, generator=generator)[None]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    _, sums = policy_loss_sum(new[tokens], old[tokens], torch.zeros_like(mask).double(), mask, 0.2)
    forward, backward = (old.exp() * (old - new)).sum().item(), (new.exp() * (new - old)).sum().item()
    assert means(sums, "tokens")["approx_kl"] == pytest.approx(forward, rel=0.02)
    assert abs(forward - backward) > 0.1 * forward  # so that the direction is told apart


@pytest.mark.parametrize("loss_sum", [policy_loss_sum, value_loss_sum])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6, 7), (4,), (1, 6)])
def test_micro_batches_add_up_to_the_whole(loss_sum, cuts):
    *tensors, mask = aligned_batch()
    gradient, loss, sums = gradient_of(loss_sum, *tensors, mask, 0.2)
    cut = zip(*(tensor.tensor_split(cuts) for tensor in (*tensors, mask)))
    parts = [gradient_of(loss_sum, *part, 0.2) for part in cut]
    assert torch.allclose(torch.cat([part[0] for part in parts]), gradient, atol=1e-12)
    assert sum(part[1] for part in parts).item() == pytest.approx(loss.item())
    merged = add_sums([part[2] for part in parts])
    assert merged.keys() == sums.keys()
    assert all(merged[name].item() == pytest.approx(sums[name].item()) for name in sums)


@pytest.mark.parametrize("loss_sum", [policy_loss_sum, value_loss_sum])
def test_garbage_outside_the_mask_reaches_neither_loss_nor_gradient(loss_sum):
    *tensors, mask = aligned_batch()
    gradient, loss, _ = gradient_of(loss_sum, *tensors, mask, 0.2)
    for garbage in (torch.nan, torch.inf, -torch.inf):
        spoilt = [tensor.masked_fill(~mask, garbage) for tensor in tensors]
        found, found_loss, sums = gradient_of(loss_sum, *spoilt, mask, 0.2)
        assert torch.equal(found, gradient) and torch.equal(found_loss, loss)
        assert all(total.isfinite() for total in sums.values())


@pytest.mark.parametrize("loss_sum", [policy_loss_sum, value_loss_sum])
def test_fillers_alone_give_a_zero_gradient_and_no_error(loss_sum):
    *tensors, mask = aligned_batch()
    gradient, loss, sums = gradient_of(loss_sum, *tensors, torch.zeros_like(mask), 0.2)
    assert loss == 0 and not gradient.any()
    assert not any(means(sums, "tokens").values())


def test_an_unmoved_critic_pays_half_the_squared_error():
    values, _, returns, mask = aligned_batch()
    _, loss, sums = gradient_of(value_loss_sum, values, values, returns, mask, 0.2)
    expected = torch.nn.functional.mse_loss(values[mask], returns[mask], reduction="sum") / 2
    assert loss.item() == pytest.approx(expected.item()) and sums["value_clip_fraction"] == 0


@settings(max_examples=200, deadline=None)
@given(move=st.floats(-2, 2), target=st.floats(-3, 3))
def test_value_clipping_blocks_the_gradient_exactly_where_the_critic_has_moved_enough(move, target):
    assume(abs(abs(move) - 0.2) > 1e-6 and abs(move - target) > 1e-6)
    # V_old is 0: V has moved enough once it has left the range and is nearer to the return than its edge.
    edge = 0.2 if move > 0 else -0.2
    assume(abs(abs(edge - target) - abs(move - target)) > 1e-6 or abs(move) < 0.2)
    tensors = [torch.tensor([[x]], dtype=torch.float64) for x in (move, 0.0, target)]
    gradient, _, sums = gradient_of(value_loss_sum, *tensors, torch.tensor([[True]]), 0.2)
    moved_enough = abs(move) > 0.2 and abs(edge - target) > abs(move - target)
    assert (gradient.item() == 0) == moved_enough
    assert sums["value_clip_fraction"].item() == moved_enough


def test_explained_variance_of_known_critics():
    _, noise, returns, mask = aligned_batch()

    def of(values):
        return explained_variance(explained_variance_sums(values, returns, mask))

    assert of(returns) == pytest.approx(1.0)
    assert of(returns + 50.0) == pytest.approx(1.0)  # a constant offset is no failure to explain
    assert of(torch.full_like(returns, 3.0)) == pytest.approx(0.0)
    assert of(-returns) == pytest.approx(-3.0)
    assert 0.0 < of(returns + 0.3 * noise) < 1.0


def test_explained_variance_merges_over_parts_far_from_zero():
    values, _, returns, mask = aligned_batch()
    values, returns = values + 1e4, returns + 1e4
    parts = zip(*(x.tensor_split((3, 4)) for x in (values, returns, mask)))
    merged = explained_variance(add_sums([explained_variance_sums(*part) for part in parts]))
    residual = (returns - values)[mask].var(unbiased=False) / returns[mask].var(unbiased=False)
    assert merged == pytest.approx(1 - residual.item(), rel=1e-6)


@pytest.mark.parametrize("constant", [0.0, 9.7])
def test_constant_returns_leave_nothing_to_explain(constant):
    returns, mask = torch.full((3, 4), constant), torch.ones(3, 4, dtype=torch.bool)
    assert explained_variance(explained_variance_sums(torch.randn(3, 4), returns, mask)) == 0.0
