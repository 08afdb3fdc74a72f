"""Answers from a model's configuration, without its weights: of which kind it is, how long sequences may be.

Every `source` is a directory or a hub name, as `common.artifacts.model_source.resolve_model` returns it.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from common.data.chat_template import control_tokens
from common.errors import ModelError, UserError, reason_of, refuse_own_code
from common.models.completeness import score_labels
from common.models.encoder_decoder import FAMILIES, is_encoder_decoder
from common.models.heads import is_encoder_config, is_scalar_config
from common.paths import unreachable_hub

# Their positions begin behind the id of the padding token, as in fairseq: 514 of RoBERTa's leave room for 512 tokens.
_COUNT_BEHIND_PADDING = frozenset(
    "camembert data2vec-text ibert longformer luke mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl "
    "xmod".split()
)


# Methods of `quantization_config` that save weights in few bits, by bitsandbytes.
_ROUNDED = ("bitsandbytes",)


class EncoderError(ModelError):
    """An encoder where a decoder is needed."""


def load_config(source: str, trust_remote_code: bool = False, **changes: Any) -> PreTrainedConfig:
    """The transformers configuration of a model, with `changes` made to it.

    Raises:
        ModelError: it cannot be loaded, or its weights are saved in few bits.
    """
    from transformers import AutoConfig

    with explained(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **changes)
    saved = getattr(config, "quantization_config", None)
    method = saved.get("quant_method") if isinstance(saved, dict) else None
    if method in _ROUNDED:
        raise ModelError(
            source,
            f"its weights are quantised already ({method}), and no sum with an adapter could be saved in them: name "
            "the model in full precision that they were made from",
        )
    return config


def gives_scores(source: str, trust_remote_code: bool = False) -> bool:
    """Whether a model is a reward model, with a trained score head.

    Raises:
        ModelError: it is a classifier of several labels.
    """
    config = load_config(source, trust_remote_code)
    if not is_scalar_config(config):
        return False
    labels = score_labels(source, config)
    if labels not in (1, None):
        raise ModelError(
            source,
            f"it is a classifier of {labels} labels, and a reward model gives one score: name one with one label, or "
            "train one from a language model with step2_reward/main.py",
        )
    return True


def max_length(source: str, trust_remote_code: bool = False) -> int | None:
    """Tokens of the longest sequence that a model can read; None if there is no limit, as with BLOOM."""
    return max_positions(load_config(source, trust_remote_code))


def max_positions(config: PreTrainedConfig) -> int | None:
    """`max_length` of a configuration that is loaded already."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.model_type in _COUNT_BEHIND_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    return positions


def check_length(source: str, tokens: int, trust_remote_code: bool = False) -> None:
    """Raises ModelError if a model cannot read sequences of so many tokens."""
    positions = max_length(source, trust_remote_code)
    if positions is not None and tokens > positions:
        raise ModelError(source, f"it has room for {positions} tokens, not for {tokens}: lower the length")


def without_embedding(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens of a tokenizer for which a model has no row of embeddings, but for padding, which is never read."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    beyond = [] if rows is None else [token for token, index in tokenizer.get_vocab().items() if index >= rows]
    return [token for token in beyond if token != tokenizer.pad_token]


def check_vocabulary(source: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> None:
    """Raises ModelError if a tokenizer makes of text ids for which a model has no embeddings.

    Special tokens may be without: loading adds rows for them.
    """
    config = load_config(source, trust_remote_code)
    special = control_tokens(tokenizer)
    words = sorted(token for token in without_embedding(config, tokenizer) if token not in special)
    if words:
        raise ModelError(
            source,
            f"its tokenizer has {len(words)} tokens more than the model has embeddings "
            f"({config.get_text_config().vocab_size}), such as {words[0]!r}: put the files of the model's own "
            "tokenizer there, or enlarge the model for this one with resize_token_embeddings() of transformers",
        )


def check_language_model(source: str, trust_remote_code: bool = False) -> None:
    """Raises ModelError for a reward model, which would load as a language model, but with a random output layer, and
    for an encoder-decoder that is not one of `FAMILIES`; EncoderError for an encoder."""
    config = load_config(source, trust_remote_code)
    if is_scalar_config(config):
        raise ModelError(source, "it is a reward model, which gives scores and no answers: name a language model")
    if is_encoder_config(config):
        raise EncoderError(
            source,
            f"it is an encoder ({config.model_type}), which reads text and writes none: name a decoder-only language "
            "model; an encoder can become a reward model",
        )
    check_encoder_decoder(source, config)


def check_encoder_decoder(source: str, config: PreTrainedConfig) -> None:
    """Raises ModelError for an encoder-decoder that is not one of `FAMILIES`, or whose start token is not known."""
    if is_encoder_decoder(config) and config.model_type not in FAMILIES:
        raise ModelError(
            source,
            f"it is an encoder-decoder of a kind that is not supported ({config.model_type}): name one of "
            f"the kind {' or '.join(FAMILIES)}, or a decoder-only language model",
        )
    if is_encoder_decoder(config) and getattr(config, "decoder_start_token_id", None) is None:
        raise ModelError(
            source, "its config.json has no decoder_start_token_id: set it to what the model was trained with"
        )


def check_gives_values(source: str, trust_remote_code: bool = False) -> None:
    """Raises EncoderError for an encoder, which has no value at each token, and ModelError for a classifier of several
    labels and as of `check_encoder_decoder`."""
    gives_scores(source, trust_remote_code)
    config = load_config(source, trust_remote_code)
    check_encoder_decoder(source, config)
    if is_encoder_config(config):
        raise without_values(source, config)


def without_values(source: str, config: PreTrainedConfig) -> EncoderError:
    """The error of an encoder where a value at each token is needed."""
    return EncoderError(
        source,
        f"it is an encoder ({config.model_type}), which scores whole texts and has no value at each token: name a "
        "decoder-only model",
    )


@contextlib.contextmanager
def explained(source: str | Path) -> Iterator[None]:
    """Within the context any error of loading a model becomes a ModelError of `source` with a message of one line."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            source,
            "its weights are a pickle that holds more than tensors, which could run code: convert them to safetensors",
        ) from error
    except Exception as error:  # a missing or damaged file may raise anything, deep in the libraries
        refuse_own_code(source, error)
        reason = unreachable_hub(error) or reason_of(error)
        if "ignore_mismatched_sizes" in reason:
            reason = (
                "config.json and the weights are not of one model: their shapes differ (a reward model is to "
                "have one label)"
            )
        raise ModelError(source, f"the model cannot be loaded: {reason}") from error
