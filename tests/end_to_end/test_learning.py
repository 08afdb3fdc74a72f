"""The built-in task, whose true reward is known: PPO must raise that, not only the reward model's score."""
import json

import pytest

from common.report import Report, make_report
from tests.launching import ROOT, launch, run

PPO_RECIPE = ROOT / "launch" / "recipes" / "quickstart" / "ppo.yaml"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The output of the quickstart's three steps."""
    output = tmp_path_factory.mktemp("quickstart") / "output"
    done = run(["bash", str(ROOT / "launch" / "quickstart.sh"), "--output_dir", str(output)], timeout=900)
    assert "TRUE reward" in done.stdout and "answers before PPO" in done.stdout
    return output


def assert_the_truth_rose(report: Report) -> None:
    assert report.truth.correct.before >= 0.80
    assert report.truth.correct.after >= report.truth.correct.before - 0.05
    assert 0.30 <= report.truth.courteous.before <= 0.65
    assert report.truth.courteous.after > 0.90
    assert report.truth.reward.after > report.truth.reward.before + 0.15
    assert report.reward.after > report.reward.before
    assert abs(report.kl.before) < 1e-5 and 0 < report.kl.after <= 20


def test_the_quickstart_learns_the_task(quickstart):
    report = make_report(quickstart / "sft", quickstart / "reward", quickstart / "ppo")
    assert report.perplexity.after < 2 < 100 < report.perplexity.before
    assert report.accuracy.after >= 0.85
    assert_the_truth_rose(report)
    assert json.loads((quickstart / "summary.json").read_text())["truth"]["courteous"]["after"] > 0.90


@pytest.mark.long
@pytest.mark.parametrize("seed", (1, 2, 3))
def test_every_seed_raises_the_true_reward(quickstart, seed, tmp_path):
    """Three seeds share steps 1 and 2."""
    launch(ROOT / "step3_ppo" / "main.py", "--config", str(PPO_RECIPE), "--seed", str(seed),
           "--actor_model_name_or_path", str(quickstart / "sft"),
           "--critic_model_name_or_path", str(quickstart / "reward"),
           "--data_output_path", str(quickstart / "data"), "--output_dir", str(tmp_path / "ppo"))
    assert_the_truth_rose(make_report(quickstart / "sft", quickstart / "reward", tmp_path / "ppo"))
