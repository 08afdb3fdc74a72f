"""Opens the rewards that a program was given, before it loads a model, and tries those that are cheap to try."""

from __future__ import annotations

from collections.abc import Sequence

from common.data.keeping import KeptColumns
from common.rewards.batch import BatchReward, RewardBatch
from common.rewards.errors import RewardError
from common.rewards.function import OF_RESPONSES, Function, FunctionReward, load_function
from common.rewards.options import NamedRewards
from common.rewards.pool import PooledFunction
from common.rewards.service import ServiceReward
from common.rewards.spec import RewardSpec

TRIED_PROMPTS = 2  # that a reward is tried on
MADE_UP = "I do not know."  # the response that it is tried with


def open_functions(specs: Sequence[RewardSpec]) -> dict[str, Function]:
    """The functions among the rewards, by their names. Raises RewardError for one that cannot be loaded."""
    return {spec.name: load_function(spec.name) for spec in specs if spec.kind == "function"}


def kept_columns(functions: Sequence[Function], named: Sequence[str]) -> KeptColumns:
    """The columns that functions declare, and those that are named besides; "*" among them stands for all."""
    required = [column for function in functions for column in function.columns]
    required += [column for column in named if column != "*"]
    optional = [column for function in functions for column in function.optional_columns]
    declared = {column: function.name for function in reversed(functions) for column in function.columns}
    return KeptColumns(
        tuple(dict.fromkeys(required)), tuple(dict.fromkeys(optional)), "*" in named, declared, OF_RESPONSES
    )


def open_reward(
    spec: RewardSpec, function: Function | None, options: NamedRewards, every_failure: bool = False
) -> BatchReward:
    """A function or a service, ready to score.

    Args:
        function: for a function, what `open_functions` found.
        every_failure: whether all responses that fail are wanted; else the first is enough.

    Raises:
        RewardError: the environment variable of the authorisation is not set.
    """
    if function is None:
        return ServiceReward(spec.name, options.service_settings())
    if options.reward_workers:
        return PooledFunction(function, options.reward_workers, options.reward_timeout, every_failure)
    return FunctionReward(function, every_failure)


def try_reward(name: str, reward: BatchReward, batch: RewardBatch) -> None:
    """Let a reward score a few made-up responses. Raises RewardError if it fails on one."""
    for failure in reward.score(batch).failures:
        row = batch.rows[failure.response] if batch.rows else ""
        raise RewardError(
            name,
            f"tried on a made-up answer, response {failure.response + 1} of {len(batch)}"
            + (f", to the prompt in {row}" if row else "")
            + f": {failure.why}",
        )
