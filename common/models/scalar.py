"""Defines the models that score: a decoder with one number per position, an encoder with one number per sequence, an
encoder-decoder with either.

`sequence_scores` reads the scores of either kind. What is saved is the inner transformers sequence-classification
model, which gives the same scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from common.models.calibration import RAW
from common.models.encoder_decoder import is_encoder_decoder
from common.models.heads import head_names, is_encoder_config


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


class ScoringModel(nn.Module):
    """A sequence-classification model with one label: a `ScalarModel` or an `EncoderModel`.

    Attributes:
        classifier: a transformers *ForSequenceClassification model whose head computes in fp32.
    """

    classifier: Any


class ScalarModel(ScoringModel):
    """Backbone and score head of a decoder, read at every position. Pooling happens outside, from lengths.

    Args:
        classifier: a transformers *ForSequenceClassification model with a linear `score`.
        calibration: the outputs are normalised by it, to the scale of rewards and values.
    """

    reward_weight: torch.Tensor
    reward_bias: torch.Tensor | None

    def __init__(self, classifier: Any, calibration: Scale = RAW):
        super().__init__()
        classifier.score.__class__ = ScoreHead  # same parameters and names, another forward
        self.classifier = classifier
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
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        reward: bool = False,
        decoder_input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Numbers at every position.

        Args:
            input_ids: (B, L) right-padded.
            attention_mask: (B, L), 1 on real tokens; not needed, since no real token attends to what comes after it.
            decoder_input_ids: with an encoder, the target (B, L'), right-padded; `input_ids` are the source then, and
                need a mask. See `common.models.encoder_decoder.model_inputs`.
            reward: use the head that `keep_reward_head` has kept, without calibration. With the adapters disabled, the
                results are the raw scores of the reward model that this model was loaded from.

        Returns:
            (B, L) fp32, with an encoder (B, L'); the numbers at padding are meaningless.
        """
        backbone = getattr(self.classifier, self.classifier.base_model_prefix)
        target = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        hidden = backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **target
        ).last_hidden_state
        if reward:
            return _scores(hidden, self.reward_weight, self.reward_bias).squeeze(-1)
        return self.calibration.normalise(self._numbers(hidden).squeeze(-1))

    def _numbers(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head makes of hidden states (B, L, H): (B, L, 1)."""
        numbers: torch.Tensor = self.classifier.score(hidden)
        return numbers


class TargetScalarModel(ScalarModel):
    """An encoder-decoder with a number at every position of the target, a critic: its encoder reads the prompt alone.

    Args:
        classifier: a transformers *ForSequenceClassification model with a `classification_head`.
        calibration: as of `ScalarModel`.

    Attributes:
        config: of the classifier; by it `common.models.encoder_decoder.model_inputs` knows what the model reads.
    """

    def __init__(self, classifier: Any, calibration: Scale = RAW):
        ScoringModel.__init__(self)
        for layer in _linear_layers_beside(classifier):
            layer.__class__ = ScoreHead
        self.classifier, self.config = classifier, classifier.config
        self.calibration = calibration

    def keep_reward_head(self) -> None:
        """Nothing: as a reward model, an encoder-decoder reads a sequence otherwise, so it is always a model apart."""

    def _numbers(self, hidden: torch.Tensor) -> torch.Tensor:
        numbers: torch.Tensor = self.classifier.classification_head(hidden)
        return numbers


class EncoderModel(ScoringModel):
    """An encoder such as DeBERTa, RoBERTa or BERT, which scores a whole sequence by a pooler and a head of its own.

    Args:
        classifier: a transformers *ForSequenceClassification model for which `is_encoder_config` holds.
    """

    def __init__(self, classifier: Any):
        super().__init__()
        for layer in _linear_layers_beside(classifier):
            layer.__class__ = ScoreHead  # same parameters and names, another forward
        self.classifier = classifier

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of sequences.

        Args:
            input_ids: (B, L), the start token at position 0, right-padded.
            attention_mask: (B, L), 1 on real tokens: every token attends to all others. None: there is no padding.

        Returns:
            (B,) fp32.
        """
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask).logits.float().squeeze(-1)


class EncoderDecoderModel(EncoderModel):
    """An encoder-decoder that scores a whole sequence. Encoder and decoder both read all of it, as in transformers.

    Args:
        classifier: a transformers *ForSequenceClassification model with a `classification_head`.
    """

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """As of `EncoderModel`. The head reads what the decoder, a token behind, computes at the last real position."""
        backbone = getattr(self.classifier, self.classifier.base_model_prefix)
        start = torch.full_like(input_ids[:, :1], self.classifier.config.decoder_start_token_id)
        hidden = backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=torch.cat([start, input_ids[:, :-1]], 1),
            use_cache=False,
        ).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = torch.arange(len(input_ids), device=input_ids.device)
        scores: torch.Tensor = self.classifier.classification_head(hidden[rows, mask.sum(1) - 1])
        return scores.squeeze(-1)


def scoring_model(classifier: Any, calibration: Scale = RAW, values: bool = False) -> ScoringModel:
    """The model around a transformers *ForSequenceClassification model; only a `ScalarModel` has a calibration.

    Args:
        values: a number at every position is wanted, also of an encoder-decoder.
    """
    if is_encoder_decoder(classifier.config):
        return TargetScalarModel(classifier, calibration) if values else EncoderDecoderModel(classifier)
    return EncoderModel(classifier) if is_encoder_config(classifier.config) else ScalarModel(classifier, calibration)


def sequence_scores(engine: Callable[..., Any], input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Score whole sequences.

    Args:
        engine: a `ScoringModel`, or a DeepSpeed engine around one.
        input_ids: (B, L), right-padded.
        lengths: (B,) real tokens per row, at least 1.

    Returns:
        (B,) fp32: of an encoder its scores, of a decoder the numbers at the last real tokens.
    """
    if not isinstance(getattr(engine, "module", engine), EncoderModel):
        return score_at_last_token(engine(input_ids=input_ids), lengths)
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    return engine(input_ids=input_ids, attention_mask=(position < lengths.unsqueeze(1)).long())


def score_at_last_token(numbers: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Pool per-position numbers to one score per sequence.

    Args:
        numbers: (B, L) from `ScalarModel`, right-padded rows.
        lengths: (B,) real tokens per row, at least 1.

    Returns:
        (B,) the number at position lengths - 1, the last real token.
    """
    return numbers.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)


def _linear_layers_beside(classifier: Any) -> list[nn.Linear]:
    """The linear layers of the head that are no part of the backbone."""
    return [
        layer
        for name in head_names(classifier)
        if not name.startswith(f"{classifier.base_model_prefix}.")
        for layer in classifier.get_submodule(name).modules()
        if isinstance(layer, nn.Linear)
    ]
