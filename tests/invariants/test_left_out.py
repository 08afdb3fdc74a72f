"""Responses that are left out of the update do not count in it, and still count where others are compared with them."""

from types import SimpleNamespace

import pytest
import torch

from common.models.calibration import RAW
from step3_ppo.calibration import ScoreScale
from step3_ppo.config import PPOConfig
from step3_ppo.generation.rollout import Rollout
from step3_ppo.loss import policy_loss_sum
from step3_ppo.models import PPOModels
from step3_ppo.scoring import ModelOutputs
from step3_ppo.trainer import PPOTrainer

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
LENGTHS = torch.tensor([2, 5, 3, 5, 1, 4])


def iteration(finished: list[bool]):
    """A rollout of two groups of three, its outputs and its token rewards."""
    generator = torch.Generator().manual_seed(3)
    rows = len(GROUPS)
    rollout = Rollout(
        torch.zeros(rows, 7, dtype=torch.long),
        torch.full((rows,), 2),
        LENGTHS,
        torch.tensor(finished),
        GROUPS,
        torch.ones(rows, dtype=torch.bool),
        torch.zeros(rows, dtype=torch.long),
    )
    noise = lambda: torch.randn(rows, 5, generator=generator)
    outputs = ModelOutputs(noise(), noise(), noise(), None, torch.randn(rows, generator=generator))
    return rollout, outputs, noise() * rollout.response_mask


def trainer(**flags) -> PPOTrainer:
    actor = SimpleNamespace(get_lr=lambda: [0.1])
    config = PPOConfig(advantage="rloo", answers_per_prompt=3, clip_range=0.1, **flags)
    models = PPOModels(actor, None, None, None, None, 1.0)
    return PPOTrainer(models, None, config, SimpleNamespace(end_ids=[2], pad_id=0), None, None, ScoreScale(RAW))


def advantages_by_definition(rewards, counted: list[int]) -> dict[tuple[int, int], float]:
    """By row and token: leave-one-out over all rows, whitened over the tokens of those that count alone."""
    totals = rewards.double().sum(1).tolist()
    found = {}
    for row in counted:
        others = [totals[other] for other in range(len(GROUPS)) if GROUPS[other] == GROUPS[row] and other != row]
        for token in range(int(LENGTHS[row])):
            found[row, token] = totals[row] - sum(others) / len(others)
    mean = sum(found.values()) / len(found)
    deviation = (sum((value - mean) ** 2 for value in found.values()) / len(found) + 1e-8) ** 0.5
    return {place: (value - mean) / deviation for place, value in found.items()}


@pytest.mark.parametrize(
    "finished", [[True] * 6, [True, False, True, False, True, True], [True, False, False, False, True, False]]
)
def test_truncated_responses_count_as_others_and_nowhere_else(finished):
    rollout, outputs, rewards = iteration(finished)
    experience = trainer(mask_truncated_answers=True).experience(rollout, outputs, rewards, None)
    counted = [row for row in range(6) if finished[row]]
    expected = advantages_by_definition(rewards, counted)
    assert [int(row.sum()) for row in experience.response_mask] == LENGTHS[counted].tolist()
    for place, row in enumerate(counted):
        for token in range(int(LENGTHS[row])):
            assert float(experience.advantages[place, token]) == pytest.approx(expected[row, token], abs=1e-5)
    # The loss of the step is the mean over what counts, with the gradient of nothing else.
    new = (outputs.old_log_probs + 0.3 * outputs.entropy).requires_grad_()
    width = experience.response_mask.shape[1]
    loss, sums = policy_loss_sum(
        new[counted, :width], experience.old_log_probs, experience.advantages, experience.response_mask, 0.1
    )
    (loss / sums["tokens"]).backward()
    gradient = torch.zeros(6, 5, dtype=torch.float64)
    for (row, token), advantage in expected.items():
        ratio = float((new.detach()[row, token] - outputs.old_log_probs[row, token]).double().exp())
        blocked = ratio > 1.1 if advantage > 0 else ratio < 0.9
        gradient[row, token] = 0.0 if blocked else -advantage * ratio / len(expected)
    torch.testing.assert_close(new.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_rows_of_dropped_groups_are_as_if_they_had_never_been():
    rollout, outputs, rewards = iteration([True] * 6)
    kept = torch.tensor([3, 4, 5])
    made = trainer().experience(rollout, outputs, rewards, kept)
    alone = trainer().advantages(rollout.select(kept), outputs.select(kept, 5), rewards[kept])
    assert torch.equal(made.advantages, alone.advantages)
    assert torch.equal(made.rollout.prompt_index, GROUPS[kept]) and torch.equal(made.old_log_probs, alone.old_log_probs)


@pytest.mark.parametrize("flags, chosen", [({"mask_truncated_answers": True}, None), ({}, torch.tensor([]).long())])
def test_where_nothing_is_left_there_is_no_step(flags, chosen, capsys):
    rollout, outputs, rewards = iteration([False] * 6)
    own = trainer(**flags)
    assert own.experience(rollout, outputs, rewards, chosen) is None
    assert own.update(None, 4) == {"optimizer_steps": 0, "actor_learning_rate": 0.1}
    assert own.optimizer_steps_made == 0
    assert "iteration 5" in capsys.readouterr().out
