"""The options of advantages and losses, with what the papers leave to the estimator or to the policy loss."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.parser import Config, option
from step3_ppo.advantages import ESTIMATORS, Estimator

POLICY_LOSSES = ("ppo", "gspo", "cispo")  # see loss.policy_loss_sum
AGGREGATIONS = ("token", "sequence", "constant")  # see loss.aggregate
_OWN_AGGREGATION = {"gspo": "sequence", "cispo": "token"}  # of policy losses whose papers define it


@dataclass(frozen=True, kw_only=True)
class LossOptions(Config):
    """Advantages and losses"""

    advantage: str = option(
        "gae",
        "how advantages are estimated; gae needs a critic, the others have none; rloo, grpo, dr_grpo and "
        "reinforce++_baseline compare the answers to one prompt",
        choices=tuple(ESTIMATORS),
    )
    whiten_advantages: bool | None = option(
        None,
        "bring advantages to mean 0 and variance 1 over all ranks; none: as --advantage is defined: not for grpo and "
        "dr_grpo",
    )
    gamma: float = option(1.0, "discount per token", low=0, high=1)
    gae_lambda: float = option(0.95, "bias against variance in the advantages (GAE)", low=0, high=1)
    gae_lambda_alpha: float | None = option(
        None, "lambda of an answer of l tokens is 1 - 1/(this l), in place of --gae_lambda (VAPO: 0.05)", above=0
    )
    critic_gae_lambda: float | None = option(
        None, "lambda of the critic's targets (VAPO: 1); none: that of the advantages", low=0, high=1
    )
    policy_loss: str = option(
        "ppo",
        "ppo: the ratio of new to old policy of each token, clipped; gspo: that of the whole answer; cispo: a "
        "clipped weight of each token, so that clipping stops no token's gradient",
        choices=POLICY_LOSSES,
    )
    clip_range: float = option(
        0.2, "clip the ratio of new to old policy to 1 plus or minus this; gspo's are about 0.0003", above=0
    )
    clip_range_high: float | None = option(
        None, "the upper side of --clip_range (DAPO: 0.28); none: the same as the lower", above=0
    )
    dual_clip: float | None = option(
        None,
        "where the advantage is negative, clip the ratio of ppo or gspo to this too (usually 3); none: no limit",
        above=1,
    )
    loss_aggregation: str | None = option(
        None,
        "the actor's loss in an optimizer step; token: mean over all tokens; sequence: mean over answers of each "
        "one's mean; constant: sum over tokens / (answers x --max_answer_seq_len); none: as the paper of "
        "--policy_loss (gspo sequence, cispo token), else of --advantage (grpo sequence, dr_grpo constant, others "
        "token)",
        choices=AGGREGATIONS,
    )
    value_clip_range: float | None = option(
        0.2, "keep new values this close to the old ones; none: no limit", unit="normalised score", above=0
    )

    @property
    def estimator(self) -> Estimator:
        """The advantage estimator that --advantage names."""
        return ESTIMATORS[self.advantage]

    @property
    def whitens(self) -> bool:
        """--whiten_advantages, or as the estimator is defined."""
        return self.estimator.whitens if self.whiten_advantages is None else self.whiten_advantages

    @property
    def aggregation(self) -> str:
        """--loss_aggregation, or that of the paper of the policy loss or of the estimator."""
        return self.loss_aggregation or _OWN_AGGREGATION.get(self.policy_loss, self.estimator.aggregation)

    def validate(self) -> None:
        super().validate()
        self.not_both("gae_lambda", "gae_lambda_alpha")
