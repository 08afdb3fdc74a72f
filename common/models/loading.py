"""Loads models from a directory or hub name, in one dtype; under ZeRO-3 the weights are partitioned while they load.

Every `source` is a directory or a hub name, as `common.artifacts.model_source.resolve_model` returns it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from common.data.tokenization import Codec
from common.errors import ModelError
from common.models.added_token import start_row
from common.models.calibration import RAW
from common.models.checks import check_finite
from common.models.completeness import surplus
from common.models.configuration import explained, gives_scores, load_config, without_values
from common.models.encoder_decoder import is_encoder_decoder, keep_output_untied, output_untied, start_id
from common.models.heads import head_names, init_head, is_encoder_config, language_model_class, score_projection
from common.models.lora import linear_modules
from common.models.quantization import quantize as quantize_layers
from common.models.scalar import ScalarModel, Scale, ScoringModel, scoring_model
from common.runtime.distributed import is_main


def load_causal_lm(
    source: str,
    codec: Codec,
    *,
    dtype: torch.dtype,
    ds_config: dict[str, Any] | None = None,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    quantize: str = "none",
    check: bool = True,
) -> PreTrainedModel:
    """A language model in `dtype`, its embeddings large enough for the codec's tokenizer; it may have an encoder too.

    Args:
        ds_config: the engine's DeepSpeed configuration; at stage 3 the weights are partitioned while they load, but
            those of a quantised model by the engine.
        dropout: every dropout probability of the model; None keeps the model's own.
        quantize: what its linear layers become: none, nf4 or int8. They then compute in `dtype`.
        check: look for weights that are not finite. All ranks must call it then.

    Raises:
        ModelError: the model cannot be loaded, is incomplete, or has weights that are not finite.
    """
    auto_class = language_model_class(_config_for(source, dtype, trust_remote_code))
    with _partitioned_loading(ds_config if quantize == "none" else None):
        model, _ = _load(auto_class, source, dtype, dropout, trust_remote_code, check=check)
        _fit(model, codec, gradient_checkpointing)
    if quantize != "none":
        settings: Any = {"dtype": dtype, "dropout": dropout, "trust_remote_code": trust_remote_code, "check": False}
        _quantize(model, quantize, dtype, lambda: load_causal_lm(source, codec, **settings))
    return model


def load_scalar_model(source: str, codec: Codec, *, calibration: Scale = RAW, **settings: Any) -> ScalarModel:
    """A model with one number at every position, from a reward model or from a language model with a new head.

    Args:
        calibration: the outputs are (raw - mean) / std.
        settings: further arguments of `load_scoring_model`.

    Raises:
        ModelError: as of `load_scoring_model`.
        EncoderError: it is an encoder.
    """
    model = load_scoring_model(source, codec, calibration=calibration, values=True, **settings)
    if not isinstance(model, ScalarModel):
        raise without_values(source, model.classifier.config)
    return model


def load_scoring_model(
    source: str,
    codec: Codec,
    *,
    dtype: torch.dtype,
    ds_config: dict[str, Any] | None = None,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    calibration: Scale = RAW,
    values: bool = False,
    seed: int = 0,
    quantize: str = "none",
    check: bool = True,
) -> ScoringModel:
    """A model that scores sequences, from a reward model, or from a language model or an encoder with a new head.

    Args:
        ds_config, dropout, quantize, check: as of `load_causal_lm`.
        calibration: of a decoder, whose outputs are (raw - mean) / std.
        values: see `scoring_model`.
        seed: of a new head's initial weights.

    Raises:
        ModelError: as of `load_causal_lm`; or the model cannot have a score head, or has one of several labels.
    """
    from transformers import AutoModelForSequenceClassification

    has_head = gives_scores(source, trust_remote_code)
    _config_for(source, dtype, trust_remote_code)
    with _partitioned_loading(ds_config if quantize == "none" else None):
        model, new = _load(
            AutoModelForSequenceClassification,
            source,
            dtype,
            dropout,
            trust_remote_code,
            new_head=not has_head,
            check=check,
            num_labels=1,
        )
        if score_projection(model) is None:
            raise ModelError(
                source,
                f"{type(model).__name__} has no linear layer that gives one score: use a decoder-only language model "
                "or an encoder",
            )
        scoring = scoring_model(_fit(model, codec, gradient_checkpointing), calibration, values)
    if not has_head:
        init_head(scoring.classifier, new, seed)
    if quantize != "none":
        settings: Any = {"dtype": dtype, "dropout": dropout, "trust_remote_code": trust_remote_code, "check": False}
        reload = lambda: load_scoring_model(source, codec, seed=seed, **settings).classifier
        _quantize(scoring.classifier, quantize, dtype, reload)
    return scoring


def load_classifier(
    source: str, *, dtype: torch.dtype, trust_remote_code: bool = False, quantize: str = "none"
) -> PreTrainedModel:
    """A sequence-classification model as it is: of any architecture, whole on every rank, without dropout.

    Args:
        quantize: as of `load_causal_lm`.

    Raises:
        ModelError: as of `load_causal_lm`.
    """
    from transformers import AutoModelForSequenceClassification

    model, _ = _load(AutoModelForSequenceClassification, source, dtype, 0.0, trust_remote_code)
    if quantize != "none":
        _quantize(model, quantize, dtype)
    return model


def _quantize(
    model: PreTrainedModel, kind: str, dtype: torch.dtype, reload: Callable[[], PreTrainedModel] | None = None
) -> None:
    """Quantise the linear layers that adapters could be added to: all but the output layer and a score's head."""
    quantize_layers(model, linear_modules(model), kind, dtype, reload)


def set_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Set every dropout probability that a transformers configuration has, and turn LayerDrop off.

    Configurations name them differently (`dropout`, `resid_pdrop`, `attention_dropout`), but all with `drop`.
    """
    for name, value in list(vars(config).items()):
        if ("drop" in name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, probability if "layer" not in name else 0.0)


def _config_for(source: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a model that is to compute in `dtype`. Raises ModelError if it cannot."""
    config = load_config(source, trust_remote_code)
    if dtype == torch.float16 and is_encoder_decoder(config):
        raise ModelError(source, f"{config.model_type} overflows in fp16: use bf16 or fp32")
    return config


@contextlib.contextmanager
def _partitioned_loading(ds_config: dict[str, Any] | None) -> Iterator[None]:
    """Let from_pretrained split the weights over ranks as it reads them, where the engine will be ZeRO-3."""
    if ds_config is None or ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    alive = HfDeepSpeedConfig(ds_config)  # transformers holds only a weak reference
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


def _load(
    auto_class: Any,
    source: str,
    dtype: torch.dtype,
    dropout: float | None,
    trust_remote_code: bool,
    new_head: bool = False,
    check: bool = True,
    **config_changes: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of those weights that no file holds: of a `new_head` only."""
    config = load_config(source, trust_remote_code, **config_changes)
    if dropout is not None:
        set_dropout(config, dropout)
    with explained(source), output_untied(auto_class, config):
        model, loading = auto_class.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    head = tuple(f"{name}." for name in head_names(model)) if new_head else ()
    new = sorted(name for name in loading["missing_keys"] if name.startswith(head))
    missing = sorted(set(loading["missing_keys"]) - set(new))
    if missing:  # transformers fills them with random numbers
        raise ModelError(
            source,
            f"its weight files lack {len(missing)} of the model's weights, such as {missing[0]}: the directory is "
            "incomplete or its config.json belongs to another model",
        )
    heads, others = surplus(loading["unexpected_keys"], encoder=is_encoder_config(config))
    if others:  # transformers leaves them out
        raise ModelError(
            source,
            f"its weight files hold {len(others)} weights more than its config.json describes, such as {others[0]}: "
            "the config.json belongs to another model",
        )
    if heads:
        _note(f"note: {source}: weights of heads without a use here are left out: {', '.join(heads)}")
    if getattr(model, "_hf_peft_config_loaded", False):  # of a repository on the hub; directories are checked before
        raise ModelError(
            source,
            "it comes with an adapter, which would be all that is trained: download both and make one model of them "
            "with inference/merge_lora.py",
        )
    if check:
        check_finite(model, source)
    keep_output_untied(model)
    return model, new


@functools.cache
def _note(message: str) -> None:
    """Print a message once, on stderr: the responses of inference/generate.py go to stdout."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


def _fit(model: PreTrainedModel, codec: Codec, gradient_checkpointing: bool) -> PreTrainedModel:
    """Give the model the codec's vocabulary and special tokens, and prepare it for training."""
    vocabulary = len(codec.tokenizer)
    if vocabulary > model.config.get_text_config().vocab_size:
        embeddings: Any = model.get_input_embeddings()
        rows, old_end = embeddings.num_embeddings, model.config.eos_token_id
        model.resize_token_embeddings(vocabulary)
        if codec.end_id >= rows:  # the row of the old end token has learnt where responses end
            start_row(model, codec.end_id, old_end[0] if isinstance(old_end, list) else old_end)
    if not is_encoder_config(model.config):  # RoBERTa counts positions from its padding token's id
        model.config.pad_token_id, model.config.eos_token_id = codec.pad_id, codec.end_id
    if model.can_generate():
        ends = list(codec.end_ids)
        # A fresh one: the publisher's sampling settings (penalties, suppressed tokens) would alter rollouts.
        model.generation_config = GenerationConfig(
            bos_token_id=codec.tokenizer.bos_token_id,
            eos_token_id=ends[0] if len(ends) == 1 else ends,
            pad_token_id=codec.pad_id,
            decoder_start_token_id=start_id(model),
        )
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
