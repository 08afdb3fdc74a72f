"""Models from a name or directory: checked at the door, loaded in one dtype, partitioned as they load under ZeRO-3."""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

from common.artifacts.provenance import RAW
from common.data.files import is_data_file
from common.data.tokenization import Codec
from common.errors import UserError, reason_of
from common.models.adapter import holds_adapter, merged_model, refuse_adapter
from common.models.added_token import start_row
from common.models.builtin import BUILTIN_MODELS, materialise
from common.models.checks import check_files, check_finite
from common.models.completeness import score_labels, surplus
from common.models.scalar import ScalarModel, Scale, init_score_head, is_scalar_config
from common.paths import OUTPUT, announce_lookup, may_be_on_hub, similar_path, unreachable_hub, writing_to
from common.runtime.distributed import is_main

_MADE_BY = {
    f"{OUTPUT}/sft": "step1_sft/main.py",
    f"{OUTPUT}/reward": "step2_reward/main.py",
    f"{OUTPUT}/ppo": "step3_ppo/main.py",
}


def resolve_model(name: str, flag: str, cache_dir: Path, merge_adapter: bool = False) -> str:
    """The directory or hub name to load a model from; a builtin model is written to the cache first.

    Args:
        merge_adapter: a directory with an adapter stands for what that and its base make together, which is written to
            the cache first.

    Raises:
        UserError: as of `check_model_name`.
    """
    check_model_name(name, flag, merge_adapter)
    if name in BUILTIN_MODELS:
        with writing_to("--data_output_path", cache_dir):
            return str(materialise(name, cache_dir))
    path = Path(name)
    if merge_adapter and holds_adapter(path):
        with writing_to("--data_output_path", cache_dir):
            return str(merged_model(path, flag, Path(cache_dir)))
    if path.is_dir():
        check_files(path, f"{flag} {name}")
        return str(path)
    announce_lookup(name)
    return name


def check_model_name(name: str, flag: str, merge_adapter: bool = False) -> None:
    """Raises UserError for neither a directory with a config.json, a builtin, nor what may be a hub name; and for a
    directory with an adapter, unless that is to be merged."""
    if name.startswith("builtin:"):
        if name not in BUILTIN_MODELS:
            raise UserError(f"{flag} {name}: no such built-in model; there are {', '.join(BUILTIN_MODELS)}")
        return
    path = Path(name)
    if path.is_dir():
        if merge_adapter and holds_adapter(path):
            return
        refuse_adapter(path, f"{flag} {name}", "add --merge_adapter")
        config = path / "config.json"
        if not config.is_file():
            raise UserError(f"{flag} {name}: the directory holds no config.json, so it is no Hugging Face model")
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{flag} {name}: {config} is not valid JSON ({error})") from None
    elif path.exists() or is_data_file(path) or not may_be_on_hub(name):
        hint = "; it is a file" if path.exists() else similar_path(path)
        if name in _MADE_BY:
            hint = f"; {_MADE_BY[name]} makes it"
        raise UserError(f"{flag} {name}: no such model directory{hint}")


def load_causal_lm(
    source: str,
    flag: str,
    codec: Codec,
    *,
    dtype: torch.dtype,
    ds_config: dict | None = None,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal language model in `dtype`, its embeddings large enough for the codec's tokenizer.

    Args:
        ds_config: the engine's DeepSpeed configuration; at stage 3 the weights are partitioned while they load.
        dropout: every dropout probability of the model; None keeps the model's own.
    """
    from transformers import AutoModelForCausalLM

    with _partitioned_loading(ds_config):
        model = _load(AutoModelForCausalLM, source, flag, dtype, dropout, trust_remote_code)
        return _fit(model, codec, gradient_checkpointing)


def load_scalar_model(
    source: str,
    flag: str,
    codec: Codec,
    *,
    dtype: torch.dtype,
    ds_config: dict | None = None,
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    calibration: Scale = RAW,
    seed: int = 0,
) -> ScalarModel:
    """A model with one number at every position, from a reward model or from a language model with a new head.

    Args:
        calibration: the outputs are (raw - mean) / std.
        seed: of a new head's initial weights.
    """
    from transformers import AutoModelForSequenceClassification

    has_head = gives_scores(source, flag, trust_remote_code)
    with _partitioned_loading(ds_config):
        model = _load(
            AutoModelForSequenceClassification,
            source,
            flag,
            dtype,
            dropout,
            trust_remote_code,
            new_head=not has_head,
            num_labels=1,
        )
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise UserError(
                f"{flag} {source}: {type(model).__name__} has no per-token score head; "
                "use a decoder-only language model"
            )
        scalar = ScalarModel(_fit(model, codec, gradient_checkpointing), calibration)
    if not has_head:
        init_score_head(scalar, seed)
    return scalar


def load_config(source: str, flag: str, trust_remote_code: bool = False, **changes):
    """The transformers configuration of a model, with `changes` made to it."""
    from transformers import AutoConfig

    with explained(f"{flag} {source}"):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **changes)


def gives_scores(source: str, flag: str, trust_remote_code: bool = False) -> bool:
    """Whether a model is a reward model, with a trained score head.

    Raises:
        UserError: it is a classifier of several labels.
    """
    config = load_config(source, flag, trust_remote_code)
    if not is_scalar_config(config):
        return False
    labels = score_labels(source, config)
    if labels not in (1, None):
        raise UserError(
            f"{flag} {source} is a classifier of {labels} labels, and a reward model gives one score: name "
            "one with one label, or train one from a language model with step2_reward/main.py"
        )
    return True


def check_max_length(source: str, flag: str, tokens: int, length_flags: str, trust_remote_code: bool = False) -> None:
    """Raises UserError if sequences of `tokens`, as `length_flags` allow, are longer than the model's positions."""
    config = load_config(source, flag, trust_remote_code).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)  # BLOOM has none: its positions have no end
    if positions is not None and tokens > positions:
        raise UserError(
            f"{length_flags} make sequences of {tokens} tokens, but {flag} {source} has room for "
            f"{positions}: lower them"
        )


def check_language_model(source: str, flag: str, trust_remote_code: bool = False) -> None:
    """Raises UserError for a reward model, which would load as a language model that has forgotten how to write."""
    if is_scalar_config(load_config(source, flag, trust_remote_code)):
        raise UserError(f"{flag} {source} is a reward model, which gives scores and no answers: name a language model")


@contextlib.contextmanager
def _partitioned_loading(ds_config: dict | None):
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
    auto_class,
    source: str,
    flag: str,
    dtype: torch.dtype,
    dropout: float | None,
    trust_remote_code: bool,
    new_head: bool = False,
    **config_changes,
) -> nn.Module:
    config = load_config(source, flag, trust_remote_code, **config_changes)
    if dropout is not None:
        set_dropout(config, dropout)
    with explained(f"{flag} {source}"):
        model, loading = auto_class.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    missing = sorted(name for name in loading["missing_keys"] if not (new_head and name.startswith("score.")))
    if missing:  # transformers fills them with random numbers
        raise UserError(
            f"{flag} {source}: its weight files lack {len(missing)} of the model's weights, such as "
            f"{missing[0]}: the directory is incomplete or its config.json belongs to another model"
        )
    heads, others = surplus(loading["unexpected_keys"])
    if others:  # transformers leaves them out
        raise UserError(
            f"{flag} {source}: its weight files hold {len(others)} weights more than its config.json "
            f"describes, such as {others[0]}: the config.json belongs to another model"
        )
    if heads:
        _note(f"note: {flag} {source}: weights of heads without a use here are left out: {', '.join(heads)}")
    if getattr(model, "_hf_peft_config_loaded", False):  # of a repository on the hub; directories are checked before
        raise UserError(
            f"{flag} {source} comes with an adapter, which would be all that is trained: download both and "
            "make one model of them with inference/merge_lora.py"
        )
    check_finite(model, f"{flag} {source}")
    return model


@functools.cache
def _note(message: str) -> None:
    """Once, on stderr: the answers of inference/generate.py go to stdout."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def explained(name: str):
    """Turn whatever loading a model raises into a UserError of one line that starts with `name`."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{name}: its weights are a pickle that holds more than tensors, which could run code: convert "
            "them to safetensors"
        ) from error
    except Exception as error:  # a missing or damaged file shows itself as almost any type, down in the libraries
        reason = unreachable_hub(error) or reason_of(error)
        if "ignore_mismatched_sizes" in reason:
            reason = (
                "config.json and the weights are not of one model: their shapes differ (a reward model is to "
                "have one label)"
            )
        raise UserError(f"{name}: the model cannot be loaded: {reason}") from error


def set_dropout(config, probability: float) -> None:
    """Set every dropout probability that a transformers configuration knows by any of the usual names."""
    for name, value in list(vars(config).items()):
        if ("drop" in name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, probability if "layer" not in name else 0.0)


def _fit(model, codec: Codec, gradient_checkpointing: bool):
    vocabulary = len(codec.tokenizer)
    if vocabulary > model.config.get_text_config().vocab_size:
        rows, old_end = model.get_input_embeddings().num_embeddings, model.config.eos_token_id
        model.resize_token_embeddings(vocabulary)
        if codec.end_id >= rows:  # the old end token's row has learnt where answers end
            start_row(model, codec.end_id, old_end[0] if isinstance(old_end, list) else old_end)
    model.config.pad_token_id, model.config.eos_token_id = codec.pad_id, codec.end_id
    if model.can_generate():
        ends = list(codec.end_ids)
        # A fresh one: what a model's publisher thinks of sampling (penalties, suppressed tokens) would alter rollouts.
        model.generation_config = GenerationConfig(
            bos_token_id=codec.tokenizer.bos_token_id,
            eos_token_id=ends[0] if len(ends) == 1 else ends,
            pad_token_id=codec.pad_id,
        )
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
