"""Defines ScalarModel, which gives one number per position, for the reward model and the critic.

Pooling happens outside the model, from lengths: see `score_at_last_token`. What is saved is the inner transformers
sequence-classification model.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from common.models.calibration import RAW


class Scale(Protocol):
    """What numbers are measured in: a `Calibration`, or one that may still change."""

    def normalise(self, scores: torch.Tensor) -> torch.Tensor:
        """(scores - mean) / std, of any shape."""


class ScoreHead(nn.Linear):
    """A linear head that computes in fp32. Near a score of 10, bf16 has steps of 0.06, coarser than most margins."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _scores(hidden, self.weight, self.bias)


def _scores(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


class ScalarModel(nn.Module):
    """Backbone and score head of a sequence-classification model with one label, read at every position.

    Args:
        classifier: a transformers *ForSequenceClassification model with a linear `score`.
        calibration: the outputs are normalised by it, to the scale of rewards and values.
    """

    reward_weight: torch.Tensor
    reward_bias: torch.Tensor | None

    def __init__(self, classifier: Any, calibration: Scale = RAW):
        super().__init__()
        classifier.score.__class__ = ScoreHead  # same parameters and names, another forward
        self.classifier: Any = classifier
        self.calibration = calibration

    def keep_reward_head(self) -> None:
        """Keep a copy of the head as it is now, which `forward(..., reward=True)` reads after training too.

        The copy is a non-persistent buffer: it is not trained, partitioned, saved in checkpoints or exported.
        """
        import deepspeed

        head = self.classifier.score
        with deepspeed.zero.GatheredParameters(list(head.parameters())):
            bias = None if head.bias is None else head.bias.detach().clone()
            self.register_buffer("reward_weight", head.weight.detach().clone(), persistent=False)
            self.register_buffer("reward_bias", bias, persistent=False)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, reward: bool = False
    ) -> torch.Tensor:
        """Numbers at every position.

        Args:
            input_ids: (B, L) right-padded.
            attention_mask: (B, L), 1 on real tokens; not needed, since no real token attends to what comes after it.
            reward: use the head that `keep_reward_head` has kept, without calibration. With the adapters disabled, the
                results are the raw scores of the reward model that this model was loaded from.

        Returns:
            (B, L) fp32; the numbers at padding are meaningless.
        """
        backbone = getattr(self.classifier, self.classifier.base_model_prefix)
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        if reward:
            return _scores(hidden, self.reward_weight, self.reward_bias).squeeze(-1)
        return self.calibration.normalise(self.classifier.score(hidden).squeeze(-1))


def score_at_last_token(numbers: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Pool per-position numbers to one score per sequence.

    Args:
        numbers: (B, L) from `ScalarModel`, right-padded rows.
        lengths: (B,) real tokens per row, at least 1.

    Returns:
        (B,) the number at position lengths - 1, the last real token.
    """
    return numbers.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)


def is_scalar_config(config: PreTrainedConfig) -> bool:
    """Whether the configuration is that of a saved sequence-classification model, which has a trained head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def init_score_head(model: ScalarModel, seed: int) -> None:
    """Initialise the head from a normal distribution with standard deviation 1 / sqrt(d + 1), d the hidden size.

    Source: Stiennon et al. 2020, arXiv:2009.01325. The weights are the same on every rank and at every ZeRO stage.
    """
    import deepspeed

    head = model.classifier.score
    generator = torch.Generator().manual_seed(seed)
    with deepspeed.zero.GatheredParameters(list(head.parameters()), modifier_rank=0):
        with torch.no_grad():
            deviation = (head.in_features + 1) ** -0.5
            head.weight.copy_(torch.randn(1, head.in_features, generator=generator) * deviation)
            if head.bias is not None:
                head.bias.zero_()
