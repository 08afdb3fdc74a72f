"""Checks a model before a long run begins: its name, the files of its directory, and its loaded weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from common.data.files import is_data_file
from common.errors import ModelError, reason_of
from common.models.adapter import holds_adapter, refuse_adapter
from common.models.builtin import BUILTIN_MODELS
from common.models.heads import is_encoder_config, is_scalar_config, language_model_class
from common.paths import OUTPUT, may_be_on_hub, similar_path
from common.runtime.distributed import on_every_rank, rank

_MADE_BY = {
    f"{OUTPUT}/sft": "step1_sft/main.py",
    f"{OUTPUT}/reward": "step2_reward/main.py",
    f"{OUTPUT}/ppo": "step3_ppo/main.py",
}
# Limits far beyond every existing model. Building anything larger would fill the memory before it could be refused.
_LIMITS = {
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "vocab_size": 2**26,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "max_position_embeddings": 2**40,
}


def check_model_name(name: str, merge_adapter: bool = False) -> None:
    """Check that a name can mean a model: a directory with a config.json, a built-in model, or a possible hub name.

    Args:
        merge_adapter: accept a directory with an adapter, which is to be merged with its base model.

    Raises:
        ModelError: it means no model.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN_MODELS:
            raise ModelError(name, f"no such built-in model; there are {', '.join(BUILTIN_MODELS)}")
        return
    path = Path(name)
    if path.is_dir():
        if merge_adapter and holds_adapter(path):
            return
        refuse_adapter(path)
        config = path / "config.json"
        if not config.is_file():
            raise ModelError(name, "the directory holds no config.json, so it is no Hugging Face model")
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(name, f"{config} is not valid JSON ({error})") from None
    elif path.exists() or is_data_file(path) or not may_be_on_hub(name):
        hint = "; it is a file" if path.exists() else similar_path(path)
        if name in _MADE_BY:
            hint = f"; {_MADE_BY[name]} makes it"
        raise ModelError(name, f"no such model directory{hint}")


def check_files(directory: Path) -> None:
    """Check that the files of a model directory can be read and that its configuration describes a model.

    No weights are loaded, and no code from the directory runs: a model with code of its own is checked when it is
    loaded.

    Raises:
        ModelError: it names the file at fault.
    """
    for path in sorted(directory.glob("*.safetensors")):
        with _readable(directory, path), safe_open(path, "pt"):
            pass
    with _quiet():
        if (path := directory / "generation_config.json").exists():
            with _readable(directory, path):
                json.loads(path.read_text(encoding="utf-8"))
                transformers.GenerationConfig.from_pretrained(directory)
        with _readable(directory, directory / "config.json"):
            _build_without_weights(directory)


def check_finite(model: nn.Module, source: str | Path) -> None:
    """Check that all weights are finite. All ranks must call it where each holds a part of the weights.

    Args:
        source: the directory or hub name of the model, for the error.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    wrong = [key for key, weight in model.named_parameters() if not _is_finite(_local_part(weight))]
    if not on_every_rank(not wrong):
        location = f", such as those of {wrong[0]}" if wrong else ""
        raise ModelError(
            source,
            f"the model's weights are not finite{location}: NaN or infinity was saved; use another model or an earlier "
            "checkpoint of it",
        )


def _local_part(weight: torch.Tensor) -> torch.Tensor:
    """The part of a weight that this rank holds.

    ZeRO-3 pads a weight to shards of equal size; the padding is left out, because it is not initialised.
    """
    if not (hasattr(weight, "ds_tensor") and hasattr(weight, "ds_numel")):
        return weight
    shard = weight.ds_tensor.flatten()
    return shard[: max(weight.ds_numel - rank() * shard.numel(), 0)]


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.numel() or not weight.is_floating_point():
        return True
    # With a NaN among the weights both extremes are NaN. Unlike isfinite() of the weights, this makes no copy of them.
    return bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all())


def _build_without_weights(directory: Path) -> None:
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            return
        raise
    text = config.get_text_config()
    for name, most in _LIMITS.items():
        size = getattr(text, name, None)
        if isinstance(size, int) and not 1 <= size <= most:
            raise ValueError(f"{name} is {size}")
    classes = (
        transformers.AutoModelForSequenceClassification
        if is_scalar_config(config) or is_encoder_config(config)
        else language_model_class(config)
    )
    if type(config) in classes._model_mapping:  # loading refuses a model of any other kind
        with torch.device("meta"):
            classes.from_config(config)


@contextlib.contextmanager
def _readable(directory: Path, path: Path) -> Iterator[None]:
    """Within the context an error becomes a ModelError of the directory that names the file `path`."""
    try:
        yield
    except OSError as error:
        raise ModelError(directory, f"{path} cannot be read: {error.strerror or reason_of(error)}") from None
    except SafetensorError as error:
        raise ModelError(
            directory, f"{path} is damaged and cannot be loaded: {reason_of(error)}: copy or download it again"
        ) from None
    except Exception as error:  # libraries validate little, so a wrong value may raise anything
        raise ModelError(directory, f"{path} describes no model: {type(error).__name__}: {reason_of(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of transformers, which come again when the model is loaded."""
    usual = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(usual)
