"""A rollout does not change training, and its tokens depend only on weights, prompts and the seed."""

import json

import pytest

from common.runtime.distributed import cores
from tests.distributed.variants import GENERATION, GENERATION_AT_LENGTH
from tests.launching import ROOT, at_length, launch_each

PROGRAM = ROOT / "tests" / "distributed" / "generation_cases.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory, builtin_cache, length):
    """By number of ranks, then by case; one launch for each number of ranks."""
    directory = tmp_path_factory.mktemp("generation")
    runs = launch_each(PROGRAM, *length, str(builtin_cache), str(directory), timeout=1800)
    return {
        ranks: {**json.loads((directory / f"{ranks}.json").read_text()), "said": done.stdout}
        for ranks, done in runs.items()
    }


def fp32(cases) -> list[str]:
    return [case for case in cases if case.endswith("fp32")]


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("case", [*GENERATION, *at_length(GENERATION_AT_LENGTH)])
def test_a_rollout_leaves_weights_and_training_bit_for_bit(found, case, ranks):
    assert all(found[ranks][case][what] for what in ("weights_unmoved", "training_unmoved", "states_away"))


@pytest.mark.parametrize("case", [*fp32(GENERATION), *at_length(fp32(GENERATION_AT_LENGTH))])
def test_rollouts_do_not_depend_on_ranks_stage_or_way(found, case):
    expected = found[1][case.replace(case[:5], "zero0")]["rollouts"]
    assert expected["0"]["fast"] != expected["1"]["fast"] != expected["2"]["fast"]  # training has moved the policy
    for ranks in (1, 2):
        for way in ("fast", "plain"):
            assert {step: texts[way] for step, texts in found[ranks][case]["rollouts"].items()} == {
                step: texts["fast"] for step, texts in expected.items()
            }, (ranks, way)


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("case", [*GENERATION, *at_length(GENERATION_AT_LENGTH)])
def test_the_sampler_records_the_log_probs_of_the_engines_own_pass(found, case, ranks):
    """Also those of a policy renormalised on the tokens that the sampler kept."""
    gaps = [gap for way in ("fast", "plain") for gap in found[ranks][case]["gaps"][way]]
    assert len(gaps) == 4 and max(gaps) < (1e-4 if case.endswith("fp32") else 0.5)


def test_zero_3_partitions_quantised_weights(found):
    """Which are whole during a pass only; at stage 0 they always are."""
    for ranks in (1, 2):
        assert any(found[ranks]["zero3-nf4-fp32"]["quantised_weights_released"])
        held = found[ranks]["zero0-nf4-fp32"]["quantised_weights_released"]
        assert held and not any(held)


def test_a_rank_may_have_no_prompt(found):
    """Then the others must not wait for its forward passes; DeepSpeed's hooks at stage 3 would."""
    expected = found[1]["one_prompt"]["0"]
    assert len(expected) == 2 and all(len(text) == 1 and text[0] for text in expected)
    assert all(found[ranks]["one_prompt"][stage] == expected for ranks in (1, 2) for stage in ("0", "3"))


@pytest.mark.parametrize("ranks", (1, 2))
def test_ranks_share_the_cores_and_say_how_weights_are_gathered(found, ranks):
    assert found[ranks]["threads"] == max(1, cores() // ranks)
    assert "note: for each rollout the whole actor is gathered on every rank" in found[ranks]["said"]


@pytest.mark.parametrize("ranks", (1, 2))
@pytest.mark.parametrize("stage", ("0", "2", "3", *at_length("1")))
def test_a_lora_critic_scores_as_the_reward_model_whatever_it_learns(found, stage, ranks):
    result = found[ranks]["shared"][stage]
    assert result["shared"] and len(set(result["scores"])) == len(result["scores"])
    values = [update["values"] for update in result["found"]]
    assert values[0] != values[1] != values[2]
    assert all(update["equal"] for update in result["found"])
    assert not any("reward" in name for name in result["names"])
