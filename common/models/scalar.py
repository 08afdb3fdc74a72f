"""ScalarModel: one number per position, for the reward model and the critic.

Pooling (the score of a response is read at its last real token) happens outside, from lengths: see
`common.models.pooling`. What is saved is the inner transformers sequence-classification model.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from common.artifacts.provenance import RAW


class Scale(Protocol):
    """What numbers are measured in: a `Calibration`, or one that may still change."""

    def normalise(self, scores: torch.Tensor) -> torch.Tensor:
        """(scores - mean) / std, of any shape."""


class ScoreHead(nn.Linear):
    """A linear head that computes in fp32: bf16 near a score of 10 has steps of 0.06, coarser than most margins."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _scores(hidden, self.weight, self.bias)


def _scores(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


class ScalarModel(nn.Module):
    """Backbone and score head of a sequence-classification model with one label, read at every position.

    Args:
        classifier: a transformers *ForSequenceClassification model with a linear `score`.
        calibration: the outputs are normalised by it, to the scale in which rewards and values are used.
    """

    def __init__(self, classifier, calibration: Scale = RAW):
        super().__init__()
        classifier.score.__class__ = ScoreHead  # same parameters and names, another forward
        self.classifier = classifier
        self.calibration = calibration

    def keep_reward_head(self) -> None:
        """Remember the head as it is now, so that `forward(..., reward=True)` reads it whatever the head learns.

        It is a buffer that no checkpoint holds: nothing trains it, partitions it or exports it.
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
            attention_mask: (B, L), 1 on real tokens; needless, since no real token sees what comes after it.
            reward: read the head that `keep_reward_head` has kept, without calibration. With the adapters off these
                are the raw scores of the reward model that this model started from.

        Returns:
            (B, L) fp32; what stands on padding means nothing.
        """
        backbone = getattr(self.classifier, self.classifier.base_model_prefix)
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        if reward:
            return _scores(hidden, self.reward_weight, self.reward_bias).squeeze(-1)
        return self.calibration.normalise(self.classifier.score(hidden).squeeze(-1))


def is_scalar_config(config) -> bool:
    """True if the configuration belongs to a saved sequence-classification model, whose head must be kept."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def init_score_head(model: ScalarModel, seed: int) -> None:
    """Initialise the head from N(0, 1/sqrt(d + 1)), d the hidden size (Stiennon et al. 2020, arXiv:2009.01325).

    The same weights on every rank, whatever the ZeRO stage.
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
