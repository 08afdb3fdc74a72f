"""Every estimator and every policy loss through the launcher, at ZeRO 2 and 3: the same run on 1 rank and on 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.artifacts.export import write_model
from common.data.tokenization import load_tokenizer, make_codec
from common.models.builtin import materialise
from common.models.loading import load_scalar_model
from tests.distributed.estimator_cases import CASES, ITERATIONS
from tests.launching import ROOT, launch_each
from tests.logs import metrics

PROGRAM = ROOT / "tests" / "distributed" / "estimator_cases.py"
RANKS = (1, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, builtin_cache) -> Path:
    """RANKS/CASE; one launch for each number of ranks."""
    place = tmp_path_factory.mktemp("estimators")
    base = str(materialise("builtin:tiny-opt", builtin_cache))
    codec = make_codec(load_tokenizer(base), "human_assistant")
    reward_model = load_scalar_model(base, codec, dtype=torch.float32, seed=7)
    write_model(reward_model, dict(reward_model.state_dict()), codec, place / "reward")
    for ranks, done in launch_each(PROGRAM, base, str(place / "reward"), str(place), timeout=900).items():
        (place / f"{ranks}.said").write_text(done.stdout)
    return place


def training(run: Path) -> list[dict]:
    return [record for record in metrics(run) if record["phase"] == "train"]


@pytest.mark.parametrize("case", CASES)
def test_one_rank_and_two_make_the_same_run(runs, case):
    one, two = (training(runs / str(ranks) / case) for ranks in RANKS)
    assert len(one) == len(two) == ITERATIONS
    for expected, found in zip(one, two):
        assert list(found) == list(expected)
        assert found.pop("phase") == expected.pop("phase")
        for name in expected:  # rounding decides of a token or two at the edge of clipping
            tolerance = {"abs": 0.05} if name.endswith("clip_fraction") else {"rel": 2e-3, "abs": 2e-4}
            assert found[name] == pytest.approx(expected[name], **tolerance), name


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_the_first_step_starts_at_the_policy_that_sampled_and_every_actor_moves(runs, case, ranks):
    first, last = training(runs / str(ranks) / case)
    assert first["actor_gradient_norm"] > 0 and first["skipped_steps"] == 0
    assert last["entropy"] != first["entropy"]
    if "kl" in first:
        assert abs(first["kl"]) < 1e-5 and abs(last["kl"]) > 0


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_a_critic_and_a_reference_are_there_only_where_they_are_used(runs, case, ranks):
    run = runs / str(ranks) / case
    of_critic = {name for name in training(run)[-1] if "critic" in name or "value" in name}
    assert bool(of_critic) == (run / "critic").exists() == case.startswith("gae")
    measured = "--kl_placement none" not in CASES[case]
    assert all(("kl" in record) == ("kl_coef" in record) == measured for record in training(run))
    assert all(("kl" in record) == measured for record in metrics(run) if record["phase"] == "eval")
    samples = [json.loads(line) for line in (run / "samples" / "after.jsonl").read_text().splitlines()]
    assert samples and all(("kl" in sample) == measured for sample in samples)
    in_loss = measured and case.startswith(("grpo", "dr_grpo", "reinforce++_baseline"))
    assert ("kl_loss" in training(run)[0]) == in_loss


@pytest.mark.parametrize("ranks", RANKS)
def test_every_run_says_what_its_actor_learns_from(runs, ranks):
    said = [line for line in (runs / f"{ranks}.said").read_text().splitlines() if line.startswith("the actor's update")]
    assert len(said) == len(CASES)
    for name, line in zip(CASES, said):
        assert f"--advantage {name.rpartition('-')[0]} " in line
