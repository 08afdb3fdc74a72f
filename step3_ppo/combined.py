"""Combines the rewards of --reward: each scores the responses, is normalised by itself, and has a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.errors import UserError
from common.models.calibration import RAW
from common.rewards.batch import BatchReward, Scores, mean_figures
from common.rewards.errors import Failure
from common.runtime.distributed import gather_objects, rank, say
from step3_ppo.calibration import ScoreScale
from step3_ppo.reward import RewardInputs, TokenRewardModel
from step3_ppo.rewards import WeightedScores, weigh_scores


@dataclass(frozen=True)
class RewardScores:
    """What each of K rewards says of B responses, the same on every rank.

    Attributes:
        labels: short names of the rewards, different for each.
        figures: what rewards have to log besides, means over the responses, by "LABEL/NAME".
    """

    labels: tuple[str, ...]
    weights: Tensor  # (K,)
    raw: Tensor  # (B, K) float32 on the CPU; 0 where a reward failed
    failed: Tensor  # (B, K) bool
    figures: dict[str, float]

    @property
    def total(self) -> Tensor:
        """(B,) weighted sum of the raw scores."""
        return (self.raw * self.weights).sum(1)

    def select(self, rows: Tensor) -> RewardScores:
        """The scores of these responses (N,) long, in this order. The figures stay those of all."""
        return replace(self, raw=self.raw[rows], failed=self.failed[rows])

    @staticmethod
    def concat(parts: Sequence[RewardScores]) -> RewardScores:
        """The scores of the responses of all parts, which are of the same rewards."""
        figures = mean_figures([(len(part.raw), part.figures) for part in parts])
        raw, failed = (torch.cat([getattr(part, name) for part in parts]) for name in ("raw", "failed"))
        return replace(parts[0], raw=raw, failed=failed, figures=figures)


@dataclass(frozen=True)
class RewardPart:
    """One of --reward.

    Attributes:
        name: as the option has it, without the weight.
        label: its short name in the log.
        reward: a reward model that reads the actor's ids is called by all ranks together; every other scores on each
            rank the responses that it generated.
        scale: of its scores.
    """

    name: str
    label: str
    weight: float
    reward: TokenRewardModel | BatchReward
    scale: ScoreScale


class CombinedReward:
    """The weighted sum of rewards.

    Args:
        zero_if_failed: a response on which a reward fails gets 0 of it, after normalisation; else that ends the run.
    """

    def __init__(self, parts: Sequence[RewardPart], zero_if_failed: bool = False):
        self.parts, self.zero_if_failed = tuple(parts), zero_if_failed
        self._weights = torch.tensor([part.weight for part in self.parts])

    def score(self, inputs: RewardInputs) -> RewardScores:
        """The raw scores of every reward. All ranks must call it together.

        Raises:
            UserError: on all ranks alike, if a reward failed on a response and that is not to count 0, or if one failed
                on all of them.
        """
        responses = len(inputs.rollout.tokens)
        raw = torch.zeros(responses, len(self.parts))
        failed = torch.zeros(responses, len(self.parts), dtype=torch.bool)
        on_ranks = gather_objects(self._of_this_rank(inputs))
        figures: dict[str, float] = {}
        failures: list[tuple[int, int, str]] = []
        for at, part in enumerate(self.parts):
            if isinstance(part.reward, TokenRewardModel):
                raw[:, at] = part.reward(inputs)
                continue
            for rows, by_part in on_ranks:
                scores = by_part[at]
                raw[rows, at] = torch.tensor(scores.numbers)
                for failure in scores.failures:
                    failed[rows[failure.response], at] = True
                    failures.append((rows[failure.response], at, failure.why))
            means = mean_figures([(len(rows), by_part[at].figures) for rows, by_part in on_ranks])
            figures |= {f"{part.label}/{name}": value for name, value in means.items()}
        self._report(inputs, failed, failures)
        return RewardScores(tuple(part.label for part in self.parts), self._weights, raw, failed, figures)

    def weigh(self, scores: RewardScores, clip: float) -> WeightedScores:
        """The sum of the scores, each normalised by its scale as it is now, and clipped."""
        scales = [part.scale.calibration or RAW for part in self.parts]
        means, stds = (torch.tensor([getattr(scale, of) for scale in scales]) for of in ("mean", "std"))
        return weigh_scores(scores.raw, scores.failed, weights=scores.weights, means=means, stds=stds, clip=clip)

    def measure(self, scores: RewardScores, of_values: ScoreScale | None) -> None:
        """Measure the scales that are not known, or that change with every iteration. Raises as of `ScoreScale`.

        Args:
            of_values: the scale of the critic's values, which may be one of them; None without a critic.
        """
        for scale, raw in self._open(scores):
            scale.measure(raw, with_critic=scale is of_values)

    def observe(self, scores: RewardScores) -> bool:
        """Include scores of an evaluation in the scales that are still to be measured. Whether all are known."""
        for scale, raw in self._open(scores):
            scale.observe(raw)
        return all(part.scale.known for part in self.parts)

    def state_dict(self) -> dict[str, list[float] | None]:
        """The scales, by the labels of the rewards."""
        return {part.label: part.scale.state_dict() for part in self.parts}

    def load_state_dict(self, state: dict[str, list[float] | None]) -> None:
        for part in self.parts:
            part.scale.load_state_dict(state[part.label])

    def close(self) -> None:
        """End what the rewards have started."""
        for part in self.parts:
            part.reward.close()

    def _open(self, scores: RewardScores) -> list[tuple[ScoreScale, Tensor]]:
        """Each scale that is not settled, with the raw scores (b,) of the responses that its reward did not fail on."""
        return [
            (part.scale, scores.raw[~scores.failed[:, at], at])
            for at, part in enumerate(self.parts)
            if not (part.scale.known and part.scale.fixed)
        ]

    def _of_this_rank(self, inputs: RewardInputs) -> tuple[list[int], dict[int, Scores]]:
        """The responses that this rank generated, and their scores by the numbers of the rewards."""
        others = {
            at: part.reward for at, part in enumerate(self.parts) if not isinstance(part.reward, TokenRewardModel)
        }
        if not others:
            return [], {}
        rows = (inputs.rollout.made_by == rank()).nonzero().squeeze(1).tolist()
        if not rows:
            return rows, {at: Scores([]) for at in others}
        batch = inputs.batch(rows)
        return rows, {at: reward.score(batch) for at, reward in others.items()}

    def _report(self, inputs: RewardInputs, failed: Tensor, failures: Sequence[tuple[int, int, str]]) -> None:
        """Name the first failure of each reward: as an error, or as a warning where failures count 0.

        Args:
            failed: (B, K) bool.
            failures: response, number of the reward, reason.
        """
        for part in sorted({at for _, at, _ in failures}):
            response, _, why = min(failure for failure in failures if failure[1] == part)
            (row,) = inputs.batch([response]).rows
            line = "--reward " + Failure(response, why).line(self.parts[part].name, response + 1, row)
            number = int(failed[:, part].sum())
            if not self.zero_if_failed:
                raise UserError(
                    f"{line}; mend it and run the same command again, which goes on where it saved last; or add "
                    "--reward_errors zero, with which such an answer gets 0"
                )
            if number == len(failed):
                raise UserError(f"{line}; it failed on all {number} answers, so nothing can be learnt from it: mend it")
            say(f"warning: {line}; {number} of {len(failed)} answers get 0 of it for such a reason")
