"""Recognises kinds of models by their configuration, and finds and initialises the head that makes a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from common.models.encoder_decoder import is_encoder_decoder


def is_scalar_config(config: PreTrainedConfig) -> bool:
    """Whether the configuration is that of a saved sequence-classification model, which has a trained head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def is_encoder_config(config: PreTrainedConfig) -> bool:
    """Whether the configuration is that of an encoder: it predicts masked tokens, and each attends to all others."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        return False
    return all(
        type(config) in kind._model_mapping for kind in (AutoModelForMaskedLM, AutoModelForSequenceClassification)
    )


def language_model_class(config: PreTrainedConfig) -> Any:
    """The class of transformers by which a model that writes text is loaded."""
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def head_names(model: Any) -> list[str]:
    """The names of the modules that make a score of what the backbone computes; [] for a model that gives no score.

    A decoder has the linear layer `score`, an encoder-decoder the module `classification_head`. In an encoder they are
    the pooler, if it is a part of the backbone, and all that stands beside the backbone.
    """
    if hasattr(model, "score"):
        return ["score"]
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    if is_encoder_decoder(model.config):
        return ["classification_head"] if hasattr(model, "classification_head") else []
    if not is_encoder_config(model.config):
        return []
    backbone = model.base_model_prefix
    pooler = [f"{backbone}.pooler"] if getattr(getattr(model, backbone), "pooler", None) is not None else []
    beside = [name for name, child in model.named_children() if name != backbone and list(child.parameters())]
    return pooler + beside


def score_projection(classifier: Any) -> nn.Linear | None:
    """The linear layer that gives the score, the last part of the head; None if there is not exactly one."""
    layers = [
        layer
        for name in head_names(classifier)
        for layer in classifier.get_submodule(name).modules()
        if isinstance(layer, nn.Linear) and layer.out_features == 1
    ]
    return layers[0] if len(layers) == 1 else None


def init_head(classifier: Any, new: Sequence[str], seed: int) -> None:
    """Initialise the layer that gives the score, and other linear layers of the head that are new.

    That layer gets N(0, 1/sqrt(d + 1)), d its inputs (Stiennon et al. 2020, arXiv:2009.01325). A new pooler gets the
    distribution that the model's configuration names, as its other layers once did. Biases are 0. The weights are the
    same on every rank and at every ZeRO stage.

    Args:
        classifier: a model for which `score_projection` finds the layer that gives the score.
        new: names of its parameters that were not in its files.
    """
    import deepspeed

    generator = torch.Generator().manual_seed(seed)
    last = score_projection(classifier)
    assert last is not None
    parts = [classifier.get_submodule(name.rpartition(".")[0]) for name in new if name.endswith(".weight")]
    for layer in [last, *(part for part in parts if isinstance(part, nn.Linear) and part is not last)]:
        usual = getattr(classifier.config, "initializer_range", 0.02)
        deviation = (layer.in_features + 1) ** -0.5 if layer is last else usual
        with deepspeed.zero.GatheredParameters(list(layer.parameters()), modifier_rank=0), torch.no_grad():
            drawn = torch.randn(layer.out_features, layer.in_features, generator=generator)
            layer.weight.copy_(drawn * deviation)
            if layer.bias is not None:
                layer.bias.zero_()
