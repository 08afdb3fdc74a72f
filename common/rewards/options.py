"""Declares the options by which programs take rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.config.option import Phase
from common.config.parser import Config, PathName, option
from common.errors import named_by
from common.rewards.spec import RewardSpec, parse_rewards, queries

if TYPE_CHECKING:
    from common.rewards.service import ServiceSettings


@dataclass(frozen=True, kw_only=True)
class NamedRewards(Config):
    """Rewards"""

    reward: tuple[PathName, ...] = option(
        (),
        "what scores the answers, each with =WEIGHT for a weighted sum: FILE.py:FUNCTION or MODULE:FUNCTION, "
        "http(s)://SERVICE, or a reward model with any tokenizer",
    )
    reward_workers: int = option(
        0, "processes of each rank that call a function of --reward; 0: the rank itself does", low=0, affects="nothing"
    )
    reward_timeout: float = option(
        60.0,
        "how long a call may take: of a service, or of a function with --reward_workers",
        unit="seconds",
        above=0,
        affects="nothing",
    )
    reward_retries: int = option(
        3,
        "further attempts at a service that cannot be reached, takes too long, or answers 429 or 5xx; the pause before "
        "the first is 0.5 seconds, and doubles",
        low=0,
        affects="nothing",
    )
    reward_header_env: str | None = option(
        None,
        "environment variable whose value is sent to services as the header Authorization: a token, or a scheme and "
        "what belongs to it",
        affects="nothing",
    )
    reward_batch_size: int = option(
        16,
        "answers that a service, or a reward model with a tokenizer of its own, gets at once",
        low=1,
        relieves=(Phase.SCORE,),
        advice="lower {flag}",
    )
    reward_max_seq_len: int | None = option(
        None,
        "longest dialogue that a reward model with a tokenizer of its own reads; the beginning of a longer one is cut "
        "off; none: as long as it can",
        unit="tokens of that model",
        low=16,
        relieves=(Phase.SCORE,),
        advice="lower {flag}",
    )

    keep_columns: tuple[str, ...] = option(
        (),
        "columns of the data that rewards get, *: all; those that a function of --reward has parameters for are kept "
        "anyway",
    )

    def reward_specs(self) -> tuple[RewardSpec, ...]:
        """The rewards of --reward. Raises UserError for one that means nothing."""
        with named_by("--reward"):
            return parse_rewards(self.reward)

    def reward_warnings(self) -> list[str]:
        """What to say of --reward at the start."""
        return [
            f"--reward {address}: the address is saved and printed as it is; if its query holds a key, put that into "
            "an environment variable and name it with --reward_header_env"
            for address in queries(self.reward_specs())
        ]

    def service_settings(self) -> ServiceSettings:
        """How services are asked."""
        from common.rewards.service import ServiceSettings

        return ServiceSettings(self.reward_batch_size, self.reward_timeout, self.reward_retries, self.reward_header_env)

    def validate(self) -> None:
        super().validate()
        kinds = {spec.kind for spec in self.reward_specs()}
        self.only_with("a function in --reward", "function" in kinds, "reward_workers")
        service, timed = "service" in kinds, "function" in kinds and self.reward_workers > 0
        self.only_with("a service in --reward", service, "reward_retries", "reward_header_env")
        self.only_with("a service in --reward, or with --reward_workers", service or timed, "reward_timeout")
        self.only_with("a service or a reward model in --reward", service or "model" in kinds, "reward_batch_size")
        self.only_with("a reward model in --reward", "model" in kinds, "reward_max_seq_len")
