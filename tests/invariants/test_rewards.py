"""Score shaping and token rewards."""

import pytest
import torch

from common.models.logprobs import length_mask
from common.training.metrics import add_sums, means
from step3_ppo.rewards import overlong_penalties, shape_scores, token_rewards

RAW = torch.tensor([9.0, 9.7, 10.4, 30.0, -30.0])
FINISHED = torch.tensor([True, False, True, True, False])
REAL = torch.ones(5, dtype=torch.bool)
CALIBRATION = {"mean": 9.7, "std": 0.7}


def test_a_reward_model_far_from_zero_keeps_its_signal():
    shaped = shape_scores(RAW, FINISHED, REAL, **CALIBRATION, clip=5.0).scores
    assert shaped.tolist() == pytest.approx([-1.0, 0.0, 1.0, 5.0, -5.0], abs=1e-5)


def test_shift_and_scale_of_the_reward_model_do_not_matter():
    shaped = shape_scores(RAW, FINISHED, REAL, **CALIBRATION).scores
    moved = shape_scores(2 * RAW - 7, FINISHED, REAL, mean=2 * 9.7 - 7, std=1.4).scores
    assert torch.allclose(shaped, moved, atol=1e-4)


def test_the_missing_end_token_costs_even_a_clipped_score():
    free = shape_scores(RAW, FINISHED, REAL, **CALIBRATION).scores
    marked_down = shape_scores(RAW, FINISHED, REAL, **CALIBRATION, missing_eos_penalty=1.5).scores
    assert torch.equal(marked_down[FINISHED], free[FINISHED])
    assert torch.allclose(marked_down[~FINISHED], free[~FINISHED] - 1.5)
    fixed = shape_scores(RAW, FINISHED, REAL, **CALIBRATION, missing_eos_score=-3.0).scores
    assert torch.equal(fixed[FINISHED], free[FINISHED]) and (fixed[~FINISHED] == -3.0).all()


def test_statistics_are_of_the_real_responses_and_merge():
    real = torch.tensor([True, True, False, True, False])
    sums = shape_scores(RAW, FINISHED, real, **CALIBRATION).sums
    found = means(sums, "responses")
    assert found["raw_score"] == pytest.approx((9.0 + 9.7 + 30.0) / 3)
    assert found["clipped"] == pytest.approx(1 / 3) and found["finished"] == pytest.approx(2 / 3)
    parts = (slice(0, 2), slice(2, 5))
    halves = [shape_scores(RAW[part], FINISHED[part], real[part], **CALIBRATION).sums for part in parts]
    assert means(add_sums(halves), "responses") == pytest.approx(found)


def test_a_broken_calibration_is_refused():
    with pytest.raises(ValueError, match="standard deviation"):
        shape_scores(RAW, FINISHED, REAL, std=0.0)


def test_rewards_of_a_response_add_up_to_its_score_less_its_kl():
    torch.manual_seed(0)
    kl, scores, lengths = torch.randn(4, 7), torch.randn(4), torch.tensor([7, 1, 3, 5])
    mask = length_mask(lengths, 7)
    rewards = token_rewards(kl, scores, mask, beta=0.1)
    for row, length in enumerate(lengths.tolist()):
        assert rewards[row].sum().item() == pytest.approx(
            scores[row].item() - 0.1 * kl[row, :length].sum().item(), abs=1e-5
        )
        assert not rewards[row, length:].any()


def test_without_kl_the_score_stands_alone_on_the_last_response_token():
    scores, mask = torch.tensor([2.0, -1.0, 5.0]), length_mask(torch.tensor([3, 1, 0]), 4)
    rewards = token_rewards(torch.zeros(3, 4), scores, mask, beta=0.1)
    assert rewards.tolist() == [[0, 0, 2, 0], [-1, 0, 0, 0], [0, 0, 0, 0]]


def test_garbage_outside_the_mask_and_in_fillers_stays_out():
    kl, scores = torch.full((2, 3), torch.nan), torch.tensor([1.0, torch.nan])
    kl[0, :2] = 1.0
    rewards = token_rewards(kl, scores, length_mask(torch.tensor([2, 0]), 3), beta=0.5)
    assert rewards.tolist() == [[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("longest, buffer", [(10, 4), (10, 10), (7, 1), (256, 64)])
def test_the_penalty_of_over_long_responses_is_dapos(longest, buffer):
    """arXiv:2503.14476, eq. 13, by its three cases, with lengths of at most `longest`."""
    lengths = torch.arange(1, longest + 1)
    found = overlong_penalties(lengths, longest, buffer, most=0.5).tolist()
    for length, penalty in zip(lengths.tolist(), found):
        free = longest - buffer
        assert penalty == pytest.approx(0.0 if length <= free else 0.5 * (length - free) / buffer)
    assert found == sorted(found) and found[-1] == 0.5


def test_over_long_responses_cost_even_a_clipped_score_and_the_mean_is_known():
    penalties = overlong_penalties(torch.tensor([1, 6, 8, 8, 10]), 10, 4, most=1.0)
    free = shape_scores(RAW, FINISHED, REAL, **CALIBRATION, missing_eos_penalty=1.5).scores
    shaped = shape_scores(RAW, FINISHED, REAL, **CALIBRATION, missing_eos_penalty=1.5, overlong=penalties)
    torch.testing.assert_close(shaped.scores, free - torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0]))
    assert means(shaped.sums, "responses")["overlong_penalty"] == pytest.approx(0.4)
    fixed = shape_scores(RAW, FINISHED, REAL, **CALIBRATION, missing_eos_score=-3.0, overlong=penalties).scores
    assert (fixed[~FINISHED] == -3.0).all()
    assert overlong_penalties(torch.tensor([10]), 10, 0, most=1.0) is None
