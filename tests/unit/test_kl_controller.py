"""The adaptive and the fixed coefficient of the KL penalty."""

import pytest

from step3_ppo.kl_controller import AdaptiveKL, FixedKL


def after(kl, responses=100, **options):
    controller = AdaptiveKL(**options)
    controller.update(kl, responses)
    return controller.beta


def test_too_much_kl_raises_beta_and_too_little_lowers_it():
    assert after(8.0) > 0.2 > after(4.0)
    assert after(6.0) == 0.2


def test_an_update_is_clipped_to_a_fifth_and_scaled_by_responses_over_horizon():
    assert after(1e9, responses=100) == pytest.approx(0.2 * (1 + 0.2 * 100 / 10_000))
    assert after(-1e9, responses=100) == pytest.approx(0.2 * (1 - 0.2 * 100 / 10_000))


@pytest.mark.parametrize("kl", [-1e9, 0.0, 1e9, float("inf")])
@pytest.mark.parametrize("responses", [1, 10_000, 10_000_000])
def test_one_update_stays_within_a_fifth_and_positive(kl, responses):
    assert 0.8 * 0.2 <= after(kl, responses) * (1 + 1e-12) and after(kl, responses) <= 1.2 * 0.2 * (1 + 1e-12)


def test_steers_a_policy_whose_kl_falls_with_beta_to_the_target():
    controller = AdaptiveKL(beta=0.2, target=6.0, horizon=1000)
    for _ in range(500):
        controller.update(kl=0.9 / controller.beta, responses=100)
    assert 0.9 / controller.beta == pytest.approx(6.0, rel=0.02)


def test_a_fixed_beta_stays():
    controller = FixedKL(0.1)
    controller.update(kl=1e6, responses=10_000)
    assert controller.beta == 0.1


def test_a_restored_controller_goes_on_as_the_first_would_have():
    first, second = AdaptiveKL(), AdaptiveKL()
    first.update(9.0, 256)
    second.load_state_dict(first.state_dict())
    first.update(7.0, 256), second.update(7.0, 256)
    assert first.beta == second.beta != AdaptiveKL().beta


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="not a number"):
        after(float("nan"))
    with pytest.raises(ValueError, match="positive"):
        AdaptiveKL(target=0.0)
