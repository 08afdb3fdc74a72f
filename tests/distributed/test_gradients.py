"""The gradient of one optimizer step does not depend on its division into micro-batches and ranks."""

from itertools import product

import pytest
from safetensors.torch import load_file

from tests.distributed.variants import LOSSES_IN, TRUNCATED, VARIANTS, VARIANTS_AT_LENGTH
from tests.launching import ROOT, at_length, launch_each

PROGRAM = ROOT / "tests" / "distributed" / "gradient_cases.py"
STEPS = ("sft_step", "reward_step", "encoder_step", "dpo_step", "kto_step", "ppo_step")


@pytest.fixture(scope="module")
def gradients(tmp_path_factory, builtin_cache, length):
    """Files named STEP.RANKS.VARIANT.safetensors; one launch for each number of ranks."""
    directory = tmp_path_factory.mktemp("gradients")
    launch_each(PROGRAM, *length, str(builtin_cache), str(directory), timeout=1800)
    return directory


@pytest.mark.parametrize("step, ranks", [*product(STEPS, (1, 2))])
@pytest.mark.parametrize("variant", [*VARIANTS, *at_length(VARIANTS_AT_LENGTH)])
def test_gradients_agree(gradients, step, ranks, variant):
    agree(gradients, step, ranks, variant)


@pytest.mark.parametrize("step, ranks", [*product(("gspo_step", "cispo_step"), (1, 2))])
@pytest.mark.parametrize("variant", LOSSES_IN)
def test_gradients_of_other_losses_and_means_agree(gradients, step, ranks, variant):
    agree(gradients, step, ranks, variant)


@pytest.mark.parametrize("variant, ranks", [*product(TRUNCATED, (1, 2))])
def test_gradients_of_what_is_left_of_a_step_agree(gradients, variant, ranks):
    agree(gradients, "truncated_ppo_step", ranks, variant)


def agree(gradients, step: str, ranks: int, variant: str) -> None:
    reference = load_file(gradients / f"{step}.1.{'lora' if variant.startswith('lora') else 'whole'}.safetensors")
    found = load_file(gradients / f"{step}.{ranks}.{variant}.safetensors")
    assert found.keys() == reference.keys()
    compared = 0
    for name, expected in reference.items():
        if expected.norm() > 1e-6:
            assert (found[name] - expected).norm() <= 1e-5 * expected.norm(), name
            compared += 1
    assert compared > len(reference) / 2


@pytest.mark.parametrize("ranks", (1, 2))
def test_stages_move_the_weights_alike_in_bf16(gradients, ranks):
    """Each of them; a start-up step that only advances Adam's counter would show as two thirds of the update."""
    reference = load_file(gradients / f"bf16.{ranks}.zero2.safetensors")
    for stage in (0, 3):
        found = load_file(gradients / f"bf16.{ranks}.zero{stage}.safetensors")
        total = sum(float(update.norm()) for update in reference.values())
        assert sum(float(update.norm()) for update in found.values()) == pytest.approx(total, rel=0.02)
        for name, expected in reference.items():
            assert (found[name] - expected).norm() <= 0.25 * expected.norm() + 1e-4, name
