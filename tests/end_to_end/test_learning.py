"""The built-in task, whose true reward is known: PPO must raise that, not only the reward model's score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.proof.estimators import run_estimator
from launch.report import Report, make_report
from step3_ppo.advantages import ESTIMATORS
from tests.launching import ROOT, launch, run

PPO_RECIPE = ROOT / "launch" / "recipes" / "quickstart" / "ppo.yaml"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The output of the quickstart's three steps."""
    return run_quickstart(tmp_path_factory.mktemp("quickstart") / "output")


def run_quickstart(output: Path, *flags: str) -> Path:
    done = run(["bash", str(ROOT / "launch" / "quickstart.sh"), "--output_dir", str(output), *flags], timeout=900)
    assert "TRUE reward" in done.stdout and "answers before PPO" in done.stdout
    return output


def assert_the_truth_rose(report: Report) -> None:
    # Of 114 held-out answers at most three more may be wrong: that much is sampling noise.
    assert report.truth.correct.before >= 0.95
    assert report.truth.correct.after >= report.truth.correct.before - 0.03
    assert 0.20 <= report.truth.courteous.before <= 0.65
    assert report.truth.courteous.after > 0.90
    assert report.truth.reward.after > report.truth.reward.before + 0.15
    assert report.reward.after > report.reward.before
    assert abs(report.kl.before) < 1e-5 and 0 < report.kl.after <= 20


def assert_the_task_was_learned(output: Path) -> None:
    report = make_report(output / "sft", output / "reward", output / "ppo")
    assert report.perplexity.after < 2 < 100 < report.perplexity.before
    assert report.accuracy.after >= 0.85
    assert_the_truth_rose(report)
    assert json.loads((output / "summary.json").read_text())["truth"]["courteous"]["after"] > 0.90


def test_the_quickstart_learns_the_task(quickstart):
    assert_the_task_was_learned(quickstart)


@pytest.mark.long
def test_two_ranks_learn_as_much(tmp_path):
    """The recipes' batches are divided among the ranks, so the number of ranks must change no step."""
    assert_the_task_was_learned(run_quickstart(tmp_path / "output", "--num_gpus", "2"))


@pytest.mark.long
@pytest.mark.parametrize("seed", (1, 2, 3))
def test_every_seed_raises_the_true_reward(quickstart, seed, tmp_path):
    """Three seeds share steps 1 and 2."""
    launch(
        ROOT / "step3_ppo" / "main.py",
        "--config",
        str(PPO_RECIPE),
        "--seed",
        str(seed),
        "--actor_model_name_or_path",
        str(quickstart / "sft"),
        "--critic_model_name_or_path",
        str(quickstart / "reward"),
        "--data_output_path",
        str(quickstart / "data"),
        "--output_dir",
        str(tmp_path / "ppo"),
    )
    assert_the_truth_rose(make_report(quickstart / "sft", quickstart / "reward", tmp_path / "ppo"))


def test_an_estimator_without_a_critic_raises_it_too(quickstart, tmp_path):
    assert_the_truth_rose(run_estimator(quickstart, "rloo", 1, tmp_path / "ppo"))


@pytest.mark.long
@pytest.mark.parametrize("seed", (1, 2, 3))
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "gae"])
def test_every_estimator_raises_it_with_every_seed(quickstart, name, seed, tmp_path):
    assert_the_truth_rose(run_estimator(quickstart, name, seed, tmp_path / "ppo"))
