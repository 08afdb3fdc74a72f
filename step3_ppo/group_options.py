"""The options that say which responses are learnt from, and which models learn."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.parser import Config, option


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(Config):
    """What is learnt from"""

    drop_equal_groups: bool = option(
        False,
        "leave a prompt out of the update where all answers to it got the same raw score; "
        "needs --answers_per_prompt of 2 or more",
    )
    max_refills: int = option(
        0,
        "where prompts were left out, roll out others in their place, at most so many times in an iteration",
        unit="rollouts",
        low=0,
    )
    mask_truncated_answers: bool = option(
        False, "leave answers that were cut by length out of the losses and of whitening"
    )
    overlong_buffer: int = option(
        0,
        "take a penalty off the score of an answer that ends among the last so many tokens of --max_answer_seq_len; "
        "it rises linearly from 0 before them to the whole of it at their end; 0: none",
        unit="tokens",
        low=0,
    )
    overlong_penalty: float = option(1.0, "the penalty at the end of --overlong_buffer", unit="normalised score", low=0)
    critic_warmup_iterations: int = option(
        0, "so many iterations at the start train the critic alone", unit="iterations", low=0
    )

    @property
    def leaves_responses_out(self) -> bool:
        """Whether the update may learn from fewer responses than were made."""
        return self.drop_equal_groups or self.mask_truncated_answers

    def validate(self) -> None:
        super().validate()
        self.only_with("--drop_equal_groups", self.drop_equal_groups, "max_refills")
        self.only_with("--overlong_buffer above 0", self.overlong_buffer > 0, "overlong_penalty")
