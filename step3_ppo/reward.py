"""Defines the `Reward` protocol, and the reward model that reads the actor's token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor

from common.data.keeping import KEPT
from common.data.tokenization import Codec
from common.models.engine import Engine
from common.models.scalar import score_at_last_token
from common.rewards.batch import Messages, RewardBatch, columns_in
from step3_ppo.config import PPOConfig
from step3_ppo.generation.rollout import Rollout
from step3_ppo.models import PPOModels, evaluating, inputs_of
from step3_ppo.sharing import compute_on_all_ranks

# Columns that `prompts`, `rollout` and the kept ones hold already.
_OF_PROMPTS = ("prompt_ids", "length", KEPT)


@dataclass(frozen=True)
class RewardInputs:
    """All that a reward may read: B responses of an iteration or an evaluation, the same on every rank.

    Attributes:
        rollout: the ids of prompts and responses, whether a response ended by itself, and the rank that generated it.
        codec: tokenizer and end tokens of the actor.
        dataset: the prepared data that the prompts are rows of.
    """

    rollout: Rollout
    codec: Codec
    dataset: Dataset

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts as text, as the actor's template renders them, without special tokens."""
        return [
            str(self.codec.tokenizer.decode(tokens[:length], skip_special_tokens=True))
            for tokens, length in zip(self.rollout.tokens.tolist(), self.rollout.prompt_lengths.tolist())
        ]

    @cached_property
    def response_ids(self) -> list[list[int]]:
        """The ids of each response, its end token included."""
        ends = zip(self.rollout.prompt_lengths.tolist(), self.rollout.lengths.tolist())
        return [tokens[start:end] for tokens, (start, end) in zip(self.rollout.tokens.tolist(), ends)]

    @cached_property
    def responses(self) -> list[str]:
        """The responses as text, without special tokens."""
        return [self.codec.decode_response(ids) for ids in self.response_ids]

    @cached_property
    def columns(self) -> dict[str, list]:
        """The other columns of the prepared data, one entry for each response: the identity of the dialogue, and the
        data's own columns that are kept, see --keep_columns."""
        rows = self.dataset[self.rollout.prompt_index.tolist()]
        prepared = {name: list(rows[name]) for name in self.dataset.column_names if name not in _OF_PROMPTS}
        return prepared | columns_in(self._kept)

    @cached_property
    def messages(self) -> list[Messages]:
        """The dialogues that were rendered to prompts.

        Raises:
            ValueError: they are not kept, which --keep_columns does.
        """
        if KEPT not in self.dataset.column_names:
            raise ValueError("the prepared data holds no dialogues: they are kept with --keep_columns")
        return [row["messages"] for row in self._kept]

    @cached_property
    def _kept(self) -> list[dict[str, Any]]:
        """What is kept of each response's row, see `common.data.keeping.kept_json`."""
        if KEPT not in self.dataset.column_names:
            return []
        rows = self.dataset.select_columns(KEPT)[self.rollout.prompt_index.tolist()]
        return [json.loads(text) for text in rows[KEPT]]

    def batch(self, rows: Sequence[int]) -> RewardBatch:
        """These responses, in this order, for rewards that know nothing of tensors.

        A column that the row of any response has is there for each, so what a reward gets does not depend on which rank
        made which response. The prepared data must hold what is kept of its rows.
        """
        own, kept = self.select(rows), [self._kept[at] for at in rows]
        return RewardBatch(
            own.prompts,
            [row["messages"] for row in kept],
            own.responses,
            own.response_ids,
            own.rollout.finished.tolist(),
            {name: [values[at] for at in rows] for name, values in columns_in(self._kept).items()},
            [row["row"] for row in kept],
        )

    def select(self, rows: Sequence[int]) -> RewardInputs:
        """The inputs of these responses alone, in this order."""
        return RewardInputs(self.rollout.select(rows), self.codec, self.dataset)


class Reward(Protocol):
    """Scores responses. `main(reward=...)` takes one in the place of the reward model."""

    def __call__(self, inputs: RewardInputs) -> Tensor:
        """Raw scores (B,) float32 on the CPU, one for each response, finite; PPO normalises and clips them itself.

        All ranks call it together with the same inputs, and each must return the same scores. What is cheap may be
        computed by every rank for itself. What is not is divided: by `compute_on_all_ranks`, or by
        `inputs.rollout.made_by`, each rank scoring the responses that it generated, and gathered. Runs are resumed
        exactly only where equal inputs get equal scores.
        """


class TokenRewardModel:
    """The reward model of step 2, which reads the ids of the actor's tokenizer.

    Args:
        engine: the frozen model; None: that of `models`, or the LoRA critic with its adapters off, see
            `PPOModels.scores`.
    """

    def __init__(self, models: PPOModels, config: PPOConfig, engine: Engine | None = None):
        self.models, self.config, self.engine = models, config, engine

    @torch.no_grad()
    def __call__(self, inputs: RewardInputs) -> Tensor:
        with evaluating(self.models):
            score = lambda part: {"scores": self._scores(part)}
            return compute_on_all_ranks(inputs.rollout, score, self.config)["scores"]

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers from a model of its own."""
        if self.engine is not None:
            self.engine.destroy()

    def _scores(self, part: Rollout) -> Tensor:
        if self.engine is None:
            return self.models.scores(part)
        return score_at_last_token(self.engine(**inputs_of(part)), part.lengths)
