"""Several rewards as one: each normalised by itself, weighted, measured as it goes, and failing where it fails."""

import json
import random

import pytest
import torch

from common.errors import UserError
from common.models.calibration import RAW, Calibration
from common.rewards.batch import Scores
from common.rewards.errors import Failure
from step3_ppo.calibration import RunningScale, ScoreScale
from step3_ppo.combined import CombinedReward, RewardPart, RewardScores
from step3_ppo.metrics import reward_metrics
from step3_ppo.rewards import shape_scores
from step3_ppo.scoring import ModelOutputs, to_scale

REAL, FINISHED = torch.ones(4, dtype=torch.bool), torch.tensor([True, True, True, False])


class Given:
    """A reward that gives what it is told to."""

    def __init__(self, numbers, failures=(), figures=None):
        self.scores, self.closed = Scores(numbers, figures or {}, tuple(failures)), False

    def score(self, batch):
        return self.scores

    def close(self):
        self.closed = True


class Inputs:
    """B responses of rank 0, with nothing in them."""

    def __init__(self, responses: int):
        class rollout:
            tokens = torch.zeros(responses, 3)
            made_by = torch.zeros(responses)

        self.rollout = rollout

    def batch(self, responses):
        class batch:
            rows = [f"data.jsonl:{at + 1}" for at in responses]

        return batch


def combined(*parts, zero=False) -> CombinedReward:
    """Of (reward, weight, scale)."""
    return CombinedReward(
        [
            RewardPart(f"file.py:r{at}", f"r{at}", weight, reward, scale)
            for at, (reward, weight, scale) in enumerate(parts)
        ],
        zero_if_failed=zero,
    )


def test_the_sum_is_that_of_the_definition():
    numbers = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).double() * 10
    first, second = Calibration(1.0, 2.0), Calibration(-3.0, 0.5)
    reward = combined(
        (Given(numbers[0].tolist()), 2.0, ScoreScale(first)), (Given(numbers[1].tolist()), -0.5, ScoreScale(second))
    )
    scores = reward.score(Inputs(4))
    weighted = reward.weigh(scores, 5.0)
    expected = [
        2.0 * min(max((a - 1.0) / 2.0, -5), 5) - 0.5 * min(max((b + 3.0) / 0.5, -5), 5)
        for a, b in zip(*numbers.tolist())
    ]
    torch.testing.assert_close(weighted.scores, torch.tensor(expected))
    torch.testing.assert_close(scores.total, (2 * numbers[0] - 0.5 * numbers[1]).float())
    shaped = shape_scores(scores.total, FINISHED, REAL, missing_eos_penalty=1.0, weighted=weighted)
    torch.testing.assert_close(shaped.scores, weighted.scores - (~FINISHED).float())
    logged = reward_metrics(scores, shaped)
    assert logged["reward/r1"] == pytest.approx(float(numbers[1].mean()))
    assert logged["reward/r1_std"] == pytest.approx(float(numbers[1].std(correction=0)))
    clipped = sum(abs(b + 3) / 0.5 > 5 for b in numbers[1].tolist()) / 4
    assert logged["reward/r1_clipped"] == clipped > 0 and logged["reward/r0_failed"] == 0


def test_one_reward_of_weight_1_is_shaped_as_the_reward_model_is():
    raw = torch.randn(4, generator=torch.Generator().manual_seed(2)) * 7
    scale = Calibration(0.3, 1.7)
    alone = shape_scores(raw, FINISHED, REAL, mean=scale.mean, std=scale.std, missing_eos_penalty=1.0)
    reward = combined((Given(raw.tolist()), 1.0, ScoreScale(scale)))
    scores = reward.score(Inputs(4))
    shaped = shape_scores(scores.total, FINISHED, REAL, missing_eos_penalty=1.0, weighted=reward.weigh(scores, 5.0))
    assert torch.equal(shaped.scores, alone.scores) and torch.equal(scores.total, raw)
    assert all(torch.equal(shaped.sums[name], alone.sums[name]) for name in alone.sums)


def test_a_reward_that_fails_ends_the_run_with_the_row_and_the_response():
    failing = Given([1.0, 0.0, 3.0, 0.0], [Failure(1, "it gave None"), Failure(3, "it gave nan")])
    with pytest.raises(UserError) as error:
        combined((Given([0.0] * 4), 1.0, ScoreScale(RAW)), (failing, 1.0, ScoreScale(RAW))).score(Inputs(4))
    assert str(error.value).startswith("--reward file.py:r1, on response 2 to the prompt in data.jsonl:2: it gave None")
    assert "--reward_errors zero" in str(error.value)


def test_where_failures_count_0_the_first_is_named_and_a_reward_that_always_fails_ends_the_run(capsys):
    some = Given([1.0, 0.0, 3.0, 0.0], [Failure(3, "it gave nan"), Failure(1, "it gave None")])
    combined((some, 1.0, ScoreScale(RAW)), zero=True).score(Inputs(4))
    assert "on response 2 to the prompt in data.jsonl:2: it gave None; 2 of 4 answers get 0" in capsys.readouterr().out
    never = Given([0.0] * 4, [Failure(at, "it raised ValueError: cannot parse") for at in range(4)])
    with pytest.raises(UserError, match="cannot parse; it failed on all 4 answers.*: mend it"):
        combined((some, 1.0, ScoreScale(RAW)), (never, 1.0, ScoreScale(RAW)), zero=True).score(Inputs(4))


def test_a_response_that_a_reward_fails_on_counts_0_after_normalisation_and_is_counted():
    failing = Given([4.0, 0.0, 8.0, 6.0], [Failure(1, "it gave None")], {"exact": 0.5})
    reward = combined((failing, 3.0, ScoreScale(Calibration(4.0, 2.0))), zero=True)
    scores = reward.score(Inputs(4))
    weighted = reward.weigh(scores, 5.0)
    assert weighted.scores.tolist() == [0.0, 0.0, 6.0, 3.0]
    logged = reward_metrics(scores, shape_scores(scores.total, FINISHED, REAL, weighted=weighted))
    assert logged["reward/r0_failed"] == 1 and logged["reward/r0"] == 6.0 and logged["reward/r0/exact"] == 0.5


def test_running_statistics_are_those_of_all_scores_in_one_pass():
    draw = random.Random(3)
    scale, seen = RunningScale(), []
    assert not scale.known
    for _ in range(20):
        batch = torch.tensor([draw.gauss(1e4, 1e-1) for _ in range(draw.randint(1, 9))], dtype=torch.float64)
        scale.measure(batch, with_critic=False)
        seen += batch.tolist()
        whole = torch.tensor(seen, dtype=torch.float64)
        assert scale.mean == pytest.approx(float(whole.mean()), rel=1e-14)
        if len(seen) > 1:
            assert scale.current.std == pytest.approx(float(whole.std(correction=0)), rel=1e-8)


def test_running_statistics_go_on_exactly_from_their_state():
    batches = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
    whole, resumed = RunningScale(), RunningScale()
    for batch in batches[:3]:
        whole.measure(batch, with_critic=False)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert resumed.current == whole.current
    for batch in batches[3:]:
        for scale in (whole, resumed):
            scale.measure(batch, with_critic=False)
        assert resumed.current == whole.current
    assert RunningScale().state_dict() is None


def test_running_statistics_wait_for_scores_that_vary_and_count_no_evaluation():
    scale = RunningScale()
    scale.observe(torch.tensor([7.0, 9.0]))
    scale.measure(torch.zeros(3), with_critic=False)
    assert scale.current == Calibration(0.0, 1.0)
    scale.measure(torch.ones(3), with_critic=False)
    assert scale.current == Calibration(0.5, 0.5)
    scale.measure(torch.zeros(0), with_critic=False)
    assert scale.count == 6


def test_the_values_of_the_critic_follow_a_scale_that_changes():
    """They are the same raw numbers in each scale."""
    scale = RunningScale()
    raw = torch.tensor([[2.0, 4.0], [6.0, 8.0]])
    for scores in (torch.tensor([1.0, 5.0]), torch.tensor([9.0, 3.0])):
        values = scale.normalise(raw)
        outputs = ModelOutputs(*torch.zeros(3, 2, 2), values, scores)
        torch.testing.assert_close(to_scale(outputs, scale).values, scale.normalise(raw))


def test_scales_are_measured_each_on_its_own_scores_and_kept():
    first, second = ScoreScale(None), RunningScale()
    settled = ScoreScale(Calibration(1.0, 2.0))
    reward = combined(
        (Given([1.0, 3.0, 5.0, 7.0]), 1.0, first),
        (Given([0.0, 0.0, 2.0, 0.0], [Failure(1, "")]), 1.0, second),
        (Given([0.0] * 4), 1.0, settled),
        zero=True,
    )
    scores = reward.score(Inputs(4))
    assert not reward.observe(scores)
    reward.measure(scores, of_values=None)
    assert first.calibration == Calibration(4.0, 5.0**0.5)  # the evaluation and the iteration, of the same scores
    assert second.count == 3 and second.mean == pytest.approx(2 / 3)
    assert settled.calibration == Calibration(1.0, 2.0) and reward.observe(scores)
    other = combined(
        *(
            (Given([0.0] * 4), 1.0, scale)
            for scale in (ScoreScale(None), RunningScale(), ScoreScale(Calibration(1.0, 2.0)))
        )
    )
    other.load_state_dict(json.loads(json.dumps(reward.state_dict())))
    assert [part.scale.current for part in other.parts] == [part.scale.current for part in reward.parts]
    other.close()
    assert all(part.reward.closed for part in other.parts)


def test_a_rank_that_made_no_response_asks_no_reward():
    class Refusing(Given):
        def score(self, batch):
            raise AssertionError("asked for nothing")

    reward = combined((Refusing([]), 1.0, ScoreScale(RAW)))
    inputs = Inputs(2)
    inputs.rollout.made_by = torch.ones(2)  # all of another rank
    assert reward._of_this_rank(inputs) == ([], {0: Scores([])})


def test_scores_that_do_not_vary_are_refused_by_the_name_of_their_reward():
    reward = combined((Given([1.0] * 4), 1.0, ScoreScale(None, "file.py:r0")))
    with pytest.raises(UserError, match="the 4 scores of file.py:r0 of the first rollouts .*--score_calibration none"):
        reward.measure(reward.score(Inputs(4)), of_values=None)


def test_scores_of_parts_are_those_of_the_whole_and_may_be_picked():
    numbers, failures = [1.0, 0.0, 3.0, 4.0], [Failure(1, "it gave None")]
    whole, first, last = (
        combined((Given(numbers[rows], failed, {"exact": exact}), 2.0, ScoreScale(RAW)), zero=True).score(Inputs(count))
        for rows, failed, exact, count in (
            (slice(0, 4), failures, 0.25, 4),
            (slice(0, 3), failures, 0.0, 3),
            (slice(3, 4), [], 1.0, 1),
        )
    )
    joined = RewardScores.concat([first, last])
    assert torch.equal(joined.raw, whole.raw) and torch.equal(joined.failed, whole.failed)
    assert joined.figures == whole.figures and joined.labels == whole.labels
    picked = whole.select(torch.tensor([3, 1]))
    assert picked.total.tolist() == [8.0, 0.0] and picked.failed.tolist() == [[False], [True]]
