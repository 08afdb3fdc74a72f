"""The losses of DPO and its family, against their definitions written with probabilities in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from alternatives.dpo.loss import LOSSES, LossOptions, Responses, preference_loss_sum

BETA, WRONG, GAMMA = 0.3, 0.1, 0.7


def responses(seed: int, pairs: int = 5) -> Responses:
    drawn = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (pairs,), generator=drawn)
    log_probs, reference = (-lengths * torch.rand(pairs, generator=drawn, dtype=torch.float64) for _ in range(2))
    return Responses(log_probs.requires_grad_(), reference, lengths)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_definition(name: str, c: tuple[float, float, int], r: tuple[float, float, int]) -> float:
    """The loss of a pair from (log pi, log pi_ref, tokens) of both responses."""
    (lc, rc, nc), (lr, rr, nr) = c, r
    h = math.log((math.exp(lc) / math.exp(lr)) * (math.exp(rr) / math.exp(rc)))
    norm = BETA * (lc - rc) / nc - BETA * (lr - rr) / nr
    if name == "sigmoid":
        return -(1 - WRONG) * math.log(sigma(BETA * h)) - WRONG * math.log(sigma(-BETA * h))
    if name == "robust":
        return (-(1 - WRONG) * math.log(sigma(BETA * h)) + WRONG * math.log(sigma(-BETA * h))) / (1 - 2 * WRONG)
    if name == "ipo":
        return (h - 1 / (2 * BETA)) ** 2
    if name == "hinge":
        return max(0.0, 1 - BETA * h)
    if name == "sigmoid_norm":
        return -(1 - WRONG) * math.log(sigma(norm)) - WRONG * math.log(sigma(-norm))
    if name == "simpo":
        return -math.log(sigma(BETA / nc * lc - BETA / nr * lr - GAMMA))
    assert name == "orpo"
    p, q = math.exp(lc) ** (1 / nc), math.exp(lr) ** (1 / nr)
    return -math.log(p) - BETA * math.log(sigma(math.log((p / (1 - p)) / (q / (1 - q)))))


def loss_of(name: str, chosen: Responses, rejected: Responses, real: torch.Tensor, sft: float | None = None):
    loss = LOSSES[name]
    options = LossOptions(BETA, WRONG, GAMMA, loss.sft_coef if sft is None else sft)
    return preference_loss_sum(loss, chosen, rejected, real, options)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_definition(name):
    chosen, rejected = responses(1), responses(2)
    real = torch.tensor([True, True, False, True, True])
    found, sums = loss_of(name, chosen, rejected, real)
    rows = [
        tuple(zip(each.log_probs.tolist(), each.reference.tolist(), each.lengths.tolist()))
        for each in (chosen, rejected)
    ]
    wanted = [by_definition(name, c, r) for c, r in zip(*rows)]
    assert found.item() == pytest.approx(sum(loss for loss, counts in zip(wanted, real) if counts), rel=1e-10)
    assert float(sums["pairs"]) == 4 and float(sums["loss"]) == pytest.approx(found.item())


@pytest.mark.parametrize("name", LOSSES)
def test_a_filler_has_no_gradient_and_a_real_pair_prefers_the_chosen_response(name):
    # At the start of training: the model is the reference.
    chosen, rejected = (replace(each, reference=each.log_probs.detach()) for each in (responses(3), responses(4)))
    real = torch.tensor([True, True, False, True, True])
    loss_of(name, chosen, rejected, real)[0].backward()
    up, down = chosen.log_probs.grad, rejected.log_probs.grad
    assert up[2] == down[2] == 0
    assert (up[real] < 0).all() and (down[real] > 0).all()


def test_the_sft_term_is_the_mean_of_minus_log_p_over_the_chosen_tokens():
    chosen, rejected = responses(5), responses(6)
    real = torch.ones(5, dtype=torch.bool)
    plain, with_sft = (loss_of("sigmoid", chosen, rejected, real, sft)[0] for sft in (0.0, 0.5))
    wanted = 0.5 * sum(-lp / n for lp, n in zip(chosen.log_probs.tolist(), chosen.lengths.tolist()))
    assert float(with_sft - plain) == pytest.approx(wanted)


def test_the_gradient_of_dpo_weighs_a_pair_by_how_wrong_its_implicit_rewards_are():
    """arXiv:2305.18290, section 4: -beta sigmoid(r(rejected) - r(chosen)) (grad log pi(chosen) - ...)."""
    chosen, rejected = responses(7), responses(8)
    real = torch.ones(5, dtype=torch.bool)
    options = LossOptions(BETA)
    preference_loss_sum(LOSSES["sigmoid"], chosen, rejected, real, options)[0].backward()
    gaps = BETA * ((chosen.log_probs - chosen.reference) - (rejected.log_probs - rejected.reference))
    weight = -BETA * torch.sigmoid(-gaps.detach())
    torch.testing.assert_close(chosen.log_probs.grad, weight)
    torch.testing.assert_close(rejected.log_probs.grad, -weight)


def test_the_robust_loss_is_unbiased_when_labels_are_flipped():
    """Its mean over clean and flipped labels is the loss of clean ones: arXiv:2403.00409, section 3.2."""
    chosen, rejected = responses(9), responses(10)
    real = torch.ones(5, dtype=torch.bool)
    right, flipped = loss_of("robust", chosen, rejected, real)[0], loss_of("robust", rejected, chosen, real)[0]
    clean = preference_loss_sum(LOSSES["sigmoid"], chosen, rejected, real, LossOptions(BETA))[0]
    assert float((1 - WRONG) * right + WRONG * flipped) == pytest.approx(float(clean))


def test_a_certain_response_has_finite_odds():
    sure = Responses(torch.zeros(1, requires_grad=True), torch.zeros(1), torch.tensor([3]))
    loss, _ = loss_of("orpo", sure, responses(11, 1), torch.tensor([True]))
    assert math.isfinite(float(loss))


def test_ties_count_a_half_and_metrics_are_sums_over_real_pairs():
    chosen = Responses(torch.tensor([-1.0, -2.0, -3.0]), torch.zeros(3), torch.tensor([1, 2, 3]))
    rejected = Responses(torch.tensor([-1.0, -4.0, 0.0]), torch.zeros(3), torch.tensor([1, 2, 3]))
    _, sums = preference_loss_sum(
        LOSSES["sigmoid"], chosen, rejected, torch.tensor([True, True, False]), LossOptions(0.5)
    )
    assert float(sums["accuracy"]) == 1.5 and float(sums["reward_margin"]) == 0.5 * 2
    assert float(sums["chosen_reward"]) == 0.5 * -3 and float(sums["rejected_log_prob"]) == -1 - 4 / 2
