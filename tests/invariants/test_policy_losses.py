"""Each policy loss and each way to average it against the papers' formulas, and their gradients, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from common.models.logprobs import length_mask
from step3_ppo.loss import kl_loss_sum, loss_units, policy_loss_sum, value_loss_sum
from step3_ppo.loss_options import AGGREGATIONS, POLICY_LOSSES
from step3_ppo.metrics import update_metrics
from step3_ppo.options import KL_ESTIMATORS

LONGEST = 11
CLIPS = [
    {"clip_range": 0.2},
    {"clip_range": 0.2, "clip_range_high": 0.28},
    {"clip_range": 0.1, "clip_range_high": 0.3, "dual_clip": 1.5},
    {"clip_range": 1.0, "clip_range_high": 2.0},
]


def batch(seed, rows=8, width=6, one_advantage=False):
    """(log_probs, old_log_probs, advantages, mask); a filler among the rows."""
    generator = torch.Generator().manual_seed(seed)
    noise, old, advantages = torch.randn(3, rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[3] = 0
    old = -old.abs()
    if one_advantage:
        advantages = advantages[:, :1].expand(rows, width)
    return old + 0.5 * noise, old, advantages, length_mask(lengths, width)


def token_losses(kind, log_probs, old, advantages, clip_range, clip_range_high=None, dual_clip=None):
    """The losses of one response's tokens, each a scalar with a gradient."""
    low, high = 1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high)
    ratios = [(new - before).exp() for new, before in zip(log_probs, old)]
    if kind == "gspo" and ratios:
        mean = (sum(new - before for new, before in zip(log_probs, old)) / len(old)).detach().exp()
        ratios = [mean * (new - new.detach()).exp() for new in log_probs]
    losses = []
    for ratio, advantage, new in zip(ratios, advantages.tolist(), log_probs):
        if kind == "cispo":
            losses.append(-min(max(ratio.item(), low), high) * advantage * new)
            continue
        gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        if dual_clip is not None and advantage < 0:
            gain = torch.maximum(gain, torch.tensor(dual_clip * advantage, dtype=torch.float64))
        losses.append(-gain)
    return losses


def averaged(responses, aggregation):
    """The loss of responses, each a list of its tokens' losses, by the definition of an aggregation."""
    responses = [losses for losses in responses if losses]
    if aggregation == "token":
        return sum(map(sum, responses)) / sum(map(len, responses))
    if aggregation == "sequence":
        return sum(sum(losses) / len(losses) for losses in responses) / len(responses)
    return sum(map(sum, responses)) / (len(responses) * LONGEST)


def loss_and_gradient(loss_of, log_probs):
    leaf = log_probs.clone().requires_grad_()
    loss = loss_of(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def found(kind, aggregation, tensors, **clip):
    """The loss of an optimizer step over a batch, and its gradient."""
    log_probs, *rest, mask = tensors
    units = loss_units(mask, aggregation, LONGEST)
    return loss_and_gradient(
        lambda leaf: policy_loss_sum(leaf, *rest, mask, policy_loss=kind, aggregation=aggregation, **clip)[0] / units,
        log_probs,
    )


@pytest.mark.parametrize("kind, aggregation", [*product(POLICY_LOSSES, AGGREGATIONS)])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_of_the_definition(kind, aggregation, clip, seed):
    tensors = log_probs, old, advantages, mask = batch(seed)

    def by_definition(leaf):
        rows = zip(leaf, old, advantages, mask)
        return averaged(
            [token_losses(kind, *(row[inside] for row in tensors_), **clip) for *tensors_, inside in rows], aggregation
        )

    for ours, wanted in zip(found(kind, aggregation, tensors, **clip), loss_and_gradient(by_definition, log_probs)):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", CLIPS[:2])
def test_gspo_is_the_sequences_clipped_ratio_where_its_tokens_share_their_advantage(clip):
    """The paper's own objective, whose gradient goes through the ratio of the whole sequence."""
    tensors = log_probs, old, advantages, mask = batch(1, one_advantage=True)
    low, high = 1 - clip["clip_range"], 1 + clip.get("clip_range_high", clip["clip_range"])

    def by_definition(leaf):
        gains = []
        for new, before, advantage, inside in zip(leaf, old, advantages, mask):
            if inside.any():
                ratio = (new - before)[inside].mean().exp()
                gains.append(torch.minimum(ratio * advantage[0], ratio.clamp(low, high) * advantage[0]))
        return -sum(gains) / len(gains)

    for ours, wanted in zip(found("gspo", "sequence", tensors, **clip), loss_and_gradient(by_definition, log_probs)):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind, aggregation", [*product(POLICY_LOSSES, AGGREGATIONS)])
def test_before_the_first_update_every_loss_has_the_gradient_of_reinforce(kind, aggregation):
    _, old, advantages, mask = batch(0)
    clip = {"clip_range": 3e-4, "clip_range_high": 4e-4, "dual_clip": 1.1}
    _, gradient = found(kind, aggregation, (old, old, advantages, mask), **clip)
    weights = {
        "token": torch.ones_like(old) / mask.sum(),
        "sequence": 1 / mask.sum(1, keepdim=True).double() / mask.any(1).sum(),
        "constant": torch.ones_like(old) / (mask.any(1).sum() * LONGEST),
    }[aggregation]
    torch.testing.assert_close(gradient, (-advantages * weights).masked_fill(~mask, 0), rtol=1e-12, atol=0)
    _, sums = policy_loss_sum(old, old, advantages, mask, policy_loss=kind, **clip)
    assert sums["clip_fraction"] == 0 and sums["approx_kl"] == 0


@pytest.mark.parametrize("kind, aggregation", [*product(POLICY_LOSSES, AGGREGATIONS)])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6, 7), (4,), (3,), (1, 6)])
def test_micro_batches_add_up_to_the_whole_step(kind, aggregation, cuts):
    """Each with its own padding; the units are counted over all of them."""
    tensors = *_, mask = batch(2)
    loss, gradient = found(kind, aggregation, tensors, **CLIPS[2])
    units, losses, gradients = 0, [], []
    for part in zip(*(tensor.tensor_split(cuts) for tensor in tensors)):
        units += loss_units(part[-1], aggregation, LONGEST)
        log_probs, *rest, inside = part
        part_loss, part_gradient = loss_and_gradient(
            lambda leaf: policy_loss_sum(leaf, *rest, inside, policy_loss=kind, aggregation=aggregation, **CLIPS[2])[0],
            log_probs,
        )
        losses.append(part_loss)
        gradients.append(part_gradient)
    torch.testing.assert_close(sum(losses) / units, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(gradients) / units, gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_garbage_outside_the_mask_and_far_ratios_leave_finite_gradients(kind):
    log_probs, old, advantages, mask = batch(4)
    clip = {"clip_range": 0.2, "dual_clip": 3.0}
    expected = found(kind, "sequence", (log_probs, old, advantages, mask), **clip)
    for garbage in (torch.nan, torch.inf):
        spoilt = [tensor.masked_fill(~mask, garbage) for tensor in (log_probs, old, advantages)]
        for ours, wanted in zip(found(kind, "sequence", (*spoilt, mask), **clip), expected):
            assert torch.equal(ours, wanted)
    far = torch.tensor([[-1.0, -500.0]])
    loss, gradient = found(kind, "token", (far, far.flip(1), torch.tensor([[-1.0, 1.0]]), far < 0), **clip)
    assert loss.isfinite() and gradient.isfinite().all()


def test_a_dual_clip_blocks_bad_tokens_that_have_become_far_likelier_and_nothing_else():
    ratios = torch.tensor([[0.5, 1.0, 2.9, 3.1, 50.0]], dtype=torch.float64)
    mask = ratios > 0
    for sign in (-1.0, 1.0):
        tensors = ratios.log(), torch.zeros_like(ratios), torch.full_like(ratios, sign), mask
        with_, without = (found("ppo", "token", tensors, clip_range=0.2, dual_clip=c)[1] for c in (3.0, None))
        blocked = (with_ == 0) & (without != 0)
        assert blocked.tolist() == [[False, False, False, sign < 0, sign < 0]]
        assert torch.equal(with_[~blocked], without[~blocked])
        _, sums = policy_loss_sum(*tensors, 0.2, dual_clip=3.0)
        assert sums["clip_fraction"] == (with_ == 0).sum()


def test_cispo_lets_every_tokens_gradient_through():
    _, old, advantages, mask = batch(5)
    moved = old + torch.linspace(-3, 3, old.numel(), dtype=torch.float64).view(old.shape)
    _, ours = found("cispo", "token", (moved, old, advantages, mask), clip_range=0.2)
    _, ppo = found("ppo", "token", (moved, old, advantages, mask), clip_range=0.2)
    assert (ours[mask] != 0).all() and (ppo[mask] == 0).any()


@pytest.mark.parametrize("estimator, aggregation", [*product(KL_ESTIMATORS, AGGREGATIONS)])
def test_the_kl_is_averaged_as_the_policy_loss(estimator, aggregation):
    log_probs, old, reference, mask = batch(6)
    reference = old + 0.3 * reference
    units = loss_units(mask, aggregation, LONGEST)
    loss, gradient = loss_and_gradient(
        lambda leaf: kl_loss_sum(leaf, old, reference, mask, estimator, aggregation)[0] / units, log_probs
    )
    value = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: (-d).exp() - 1 + d}[estimator]
    rows, expected = [], torch.zeros_like(log_probs)
    for row, inside in enumerate(mask):
        ratio = (log_probs - old)[row].exp()
        d = (log_probs - reference)[row]
        rows.append(list((ratio * value(d))[inside]))
        weight = {"token": mask.sum(), "constant": mask.any(1).sum() * LONGEST}.get(
            aggregation, mask.any(1).sum() * inside.sum()
        )
        expected[row][inside] = (ratio * d / weight)[inside]
    torch.testing.assert_close(loss, averaged(rows, aggregation), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


def test_without_a_range_the_value_loss_is_half_the_squared_error():
    values, old, returns, mask = batch(7)
    loss, gradient = loss_and_gradient(lambda leaf: value_loss_sum(leaf, old, returns, mask, None)[0], values)
    assert float(loss) == pytest.approx(float(0.5 * (values - returns)[mask].square().sum()))
    torch.testing.assert_close(gradient, (values - returns).masked_fill(~mask, 0))
    assert value_loss_sum(values, old, returns, mask, None)[1]["value_clip_fraction"] == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_logged_losses_are_those_that_were_minimised(aggregation):
    """Means over two steps, each weighed by what it was divided by; the other metrics stay means over tokens."""
    steps, losses, units = [], [], []
    for seed in (0, 1):
        log_probs, old, advantages, mask = batch(seed)
        loss, sums = policy_loss_sum(log_probs, old, advantages, mask, 0.2, aggregation=aggregation)
        units.append(loss_units(mask, aggregation, LONGEST).double())
        losses.append(float(loss / units[-1]))
        steps.append({**sums, "policy_units": units[-1]})
    logged = update_metrics(steps)
    weights = [float(unit / sum(units)) for unit in units]
    assert logged["policy_loss"] == pytest.approx(sum(w * loss for w, loss in zip(weights, losses)))
    tokens = sum(step["tokens"] for step in steps)
    assert logged["clip_fraction"] == pytest.approx(float(sum(step["clip_fraction"] for step in steps) / tokens))
    assert "policy_units" not in logged


def test_unknown_names_are_refused():
    one = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="gspo"):
        policy_loss_sum(*one, 0.2, policy_loss="trpo")
    with pytest.raises(ValueError, match="sequence"):
        loss_units(one[-1], "mean", LONGEST)
