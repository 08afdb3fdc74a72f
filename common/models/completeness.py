"""Checks that a model directory holds exactly the weights of the model that its config.json describes.

Only names and shapes are read: no weight is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedConfig

from common.models.adapter import ADAPTER_CONFIG, holds_adapter
from common.models.heads import is_scalar_config, language_model_class

# Heads that a directory may hold besides the model: a language model's head where a score head is wanted, or the value
# head that other libraries save with an actor.
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|score|v_head|value_head|mtp)\.")
# Heads of the pre-training of encoders, and poolers that their classifiers do not read.
_ENCODER_HEADS = re.compile(
    r"^(cls|lm_predictions|mask_predictions|predictions|sop_classifier|generator_predictions|"
    r"discriminator_predictions|vocab_transform|vocab_layer_norm|vocab_projector|decoder)\.|(^|\.)pooler\."
)
# Buffers, not weights: masks, positions and version numbers that older versions saved and that models compute anew.
_BUFFERS = re.compile(r"(^|\.)(version|_float_tensor|position_ids|inv_freq|masked_bias|(attn|attention)\.bias)$")

# The last layers of classifiers, a row per label: of decoders; of DeBERTa and BERT; of RoBERTa; of T5.
_PROJECTIONS = {
    "score.weight",
    "classifier.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
}


def surplus(names: Iterable[str], encoder: bool = False) -> tuple[list[str], list[str]]:
    """Sort the names of weights that a model does not use into those of heads, which are harmless, and all others.

    Args:
        encoder: count the heads of the pre-training of encoders too.
    """
    heads: list[str] = []
    others: list[str] = []
    for name in sorted(names):
        if _BUFFERS.search(name):
            continue
        (heads if _HEADS.search(name) or encoder and _ENCODER_HEADS.search(name) else others).append(name)
    return heads, others


def problem(directory: Path, trust_remote_code: bool = False) -> str | None:
    """Why transformers could not load a saved directory as the whole model of its config.json; None if it could."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if holds_adapter(directory):
        return f"it holds an adapter, {ADAPTER_CONFIG}"
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        # A model with code of its own may have a class of another name, so the weights count too.
        scores = is_scalar_config(config) or _saved_labels(directory) is not None
        auto_class = AutoModelForSequenceClassification if scores else language_model_class(config)
        _, loading = auto_class.from_pretrained(
            directory, device_map="meta", output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a missing or damaged file may raise anything, deep in the libraries
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(map(str, loading[f"{kind}_keys"]))
        if names:
            return f"{len(names)} of its weights are {kind}, such as {names[0]}"
    return None


def score_labels(source: str, config: PreTrainedConfig) -> int | None:
    """The number of labels of a classifier: from its weights, else from its config.json; None if neither tells it."""
    saved = _saved_labels(Path(source))
    if saved is not None:
        return saved
    return config.num_labels if config.num_labels != 2 else None  # 2 is also the default of transformers


def _saved_labels(directory: Path) -> int | None:
    """Labels of the head in a directory's safetensors files; None if there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(directory.glob("*.safetensors")) if directory.is_dir() else ():
        try:
            with safe_open(path, "pt") as file:
                for name in _PROJECTIONS.intersection(file.keys()):
                    return file.get_slice(name).get_shape()[0]
        except (OSError, SafetensorError):
            return None  # loading the model reports what is wrong
    return None
