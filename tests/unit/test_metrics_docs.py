"""docs/metrics.md has every metric that the programs log, and no other."""

import ast
import inspect
import json
import textwrap
from types import SimpleNamespace

import pytest
import torch

from alternatives.dpo.config import DPOConfig
from alternatives.dpo.kto_loss import KTOOptions, kto_loss_sum
from alternatives.dpo.kto_task import KTOTask
from alternatives.dpo.loss import LOSSES, LossOptions, Responses, preference_loss_sum
from alternatives.dpo.task import DPOTask
from common.artifacts.tracking import Tracker
from common.config.option import Phase
from common.paths import ROOT
from common.supervised.trainer import SupervisedTrainer
from common.training.loop import SupervisedLoop
from common.training.timing import PhaseClock
from step1_sft.config import SFTConfig
from step1_sft.task import SFTTask
from step2_reward.config import RewardConfig
from step2_reward.loss import bradley_terry_loss_sum
from step2_reward.task import RewardTask
from step3_ppo.combined import RewardScores
from step3_ppo.config import PPOConfig
from step3_ppo.diagnostics import ratio_sums
from step3_ppo.experience import Experience
from step3_ppo.generation.rollout import Rollout
from step3_ppo.loss import kl_loss_sum, policy_loss_sum, value_loss_sum
from step3_ppo.metrics import (
    experience_metrics,
    gradient_norms,
    learning_rates,
    rollout_metrics,
    time_metrics,
    update_metrics,
)
from step3_ppo.rewards import WeightedScores, shape_scores
from step3_ppo.scoring import ModelOutputs
from step3_ppo.trainer import PPOTrainer
from tests.metrics_docs import as_documented, documented_metrics

ONE = torch.ones((), dtype=torch.float64)
ROWS, WIDTH = 4, 3


def literal_names(function) -> set[str]:
    """The names that a function writes out itself: keys of its dicts, and of what it assigns to."""
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    keys = [key for node in nodes if isinstance(node, ast.Dict) for key in node.keys]
    keys += [target.slice for target in targets if isinstance(target, ast.Subscript)]
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def names_of_rows(tmp_path) -> set[str]:
    """What the tracker adds to a row."""
    tracker = Tracker(tmp_path, tensorboard=False)
    tracker.begin()
    tracker.log("done", 1, {})
    tracker.close()
    return set(json.loads((tmp_path / "logs" / "metrics.jsonl").read_text()))


def supervised_names(task, sums) -> set[str]:
    of_loop = literal_names(SupervisedTrainer.train_step) | literal_names(SupervisedLoop._train)
    return {*task.train_metrics(sums), *task.evaluation_metrics(sums), *of_loop}


def ppo_names() -> set[str]:
    """With every option that adds a metric."""
    steps = torch.full((ROWS, WIDTH), -1.0)
    lengths = torch.full((ROWS,), WIDTH)
    everything = torch.ones(ROWS, dtype=torch.bool)
    groups = torch.tensor([0, 0, 1, 1])
    tokens = torch.ones(ROWS, 1 + WIDTH, dtype=torch.long)
    rollout = Rollout(tokens, torch.ones_like(lengths), lengths, everything, groups, everything, 0 * lengths, steps)
    failed = torch.tensor([[False, True]] * ROWS)
    named = RewardScores(("f", "f-2"), torch.ones(2), torch.rand(ROWS, 2), failed, {"f/cut": 0.0})
    outputs = ModelOutputs(steps, steps, -steps, steps, named.total, named)
    weighted = WeightedScores(named.total, failed.float())
    shaped = shape_scores(named.total, everything, everything, overlong=torch.zeros(ROWS), weighted=weighted)
    experience = Experience(rollout, steps, steps, steps, steps, steps)
    mask = rollout.response_mask
    total = policy_loss_sum(steps, steps, steps, mask, 0.2)[1] | ratio_sums(steps, steps, mask)
    total |= kl_loss_sum(steps, steps, steps, mask, "k1")[1] | value_loss_sum(steps, steps, steps, mask, 0.2)[1]
    total |= {"policy_units": ONE, "text_loss": ONE, "text_tokens": ONE}
    clock = PhaseClock()
    phases = (Phase.GENERATE, Phase.LOG_PROBS, Phase.SCORE, "advantages", Phase.ACTOR_UPDATE, Phase.CRITIC_UPDATE)
    clock.seconds = dict.fromkeys(phases, 0.0)
    engine = SimpleNamespace(get_lr=lambda: [0.1], get_global_grad_norm=lambda: 1.0)
    engines = {"actor": engine, "critic": engine}
    return {
        *rollout_metrics(rollout, shaped, outputs),
        *experience_metrics(experience, PPOConfig(mask_truncated_answers=True)),
        *update_metrics([total]),
        *learning_rates(engines),
        *gradient_norms(engines),
        *time_metrics(clock, ROWS),
        *literal_names(PPOTrainer.report),
    }


PAIR = Responses(ONE[None], ONE[None], ONE[None])


def dpo_names() -> set[str]:
    sums = preference_loss_sum(LOSSES["sigmoid"], PAIR, PAIR, ONE[None].bool(), LossOptions(1.0))[1]
    return supervised_names(DPOTask(DPOConfig()), sums)


def kto_names() -> set[str]:
    """With responses of both labels."""
    both = Responses(*[torch.ones(2)] * 3)
    sums = kto_loss_sum(both, torch.tensor([True, False]), torch.ones(2).bool(), ONE, KTOOptions(1.0))[1]
    return supervised_names(KTOTask(DPOConfig(loss_type="kto")), sums)


NAMES = {
    "sft": lambda: supervised_names(SFTTask(SFTConfig()), {"tokens": ONE, "loss": ONE}),
    "reward": lambda: supervised_names(
        RewardTask(RewardConfig()), bradley_terry_loss_sum(ONE[None], ONE[None], ONE[None].bool())[1]
    ),
    "dpo": lambda: dpo_names() | kto_names(),
    "ppo": ppo_names,
}


@pytest.mark.parametrize("step", NAMES)
def test_the_page_has_every_metric_and_no_other(step, tmp_path):
    logged = {as_documented(name) for name in NAMES[step]()} | names_of_rows(tmp_path)
    assert logged - documented_metrics(step) == set(), "add a row to docs/metrics.md"
    assert documented_metrics(step) - logged == set(), "docs/metrics.md speaks of metrics that there are not"


@pytest.mark.parametrize(
    "name, general",
    [
        ("reward", "reward"),
        ("reward/127.0.0.1", "reward/NAME"),
        ("reward/dup-2_failed", "reward/NAME_failed"),
        ("reward/f_std", "reward/NAME_std"),
        ("reward/f/longest", "reward/NAME/FIGURE"),
        ("rewards", "rewards"),
    ],
)
def test_names_of_rewards_are_general(name, general):
    assert as_documented(name) == general


def test_files_that_the_page_names_are_there():
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    named = {word for word in page.split("`") if word.endswith(".py")}
    assert {name for name in named if not (ROOT / name).is_file()} == set()
