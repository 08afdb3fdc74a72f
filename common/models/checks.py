"""A model directory looked at before anything long begins, and its weights before they are used."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from common.errors import UserError, reason_of
from common.models.scalar import is_scalar_config
from common.runtime.distributed import on_every_rank, rank

# Far beyond any model there is; what is larger would fill the memory before it can be refused.
_MOST = {
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "vocab_size": 2**26,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "max_position_embeddings": 2**40,
}


def check_files(directory: Path, name: str) -> None:
    """Raises UserError that starts with `name` and names the file of a model directory of which nothing can be made.

    Loads no weights and runs no code of the model's own: a model that needs such is judged when it is loaded.
    """
    for path in sorted(directory.glob("*.safetensors")):
        with _named(name, path), safe_open(path, "pt"):
            pass
    with _quiet():
        if (path := directory / "generation_config.json").exists():
            with _named(name, path):
                json.loads(path.read_text(encoding="utf-8"))
                transformers.GenerationConfig.from_pretrained(directory)
        with _named(name, directory / "config.json"):
            _build_without_weights(directory)


def check_finite(model: nn.Module, name: str) -> None:
    """Raises UserError if a weight is not a finite number. All ranks must call it where each has a part of them."""
    wrong = [key for key, weight in model.named_parameters() if not _is_finite(_held(weight))]
    if not on_every_rank(not wrong):
        where = f", such as those of {wrong[0]}" if wrong else ""
        raise UserError(
            f"{name}: the model's weights are not finite{where}: NaN or infinity was saved; use another "
            "model or an earlier checkpoint of it"
        )


def _held(weight: torch.Tensor) -> torch.Tensor:
    """What this rank has of a weight. Under ZeRO-3 shards are of equal size: beyond the last weight lies anything."""
    if not hasattr(weight, "ds_tensor"):
        return weight
    shard = weight.ds_tensor.flatten()
    return shard[: max(weight.ds_numel - rank() * shard.numel(), 0)]


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.numel() or not weight.is_floating_point():
        return True
    return bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all())  # NaN is both; no copy is made


def _build_without_weights(directory: Path) -> None:
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            return
        raise
    text = config.get_text_config()
    for name, most in _MOST.items():
        size = getattr(text, name, None)
        if isinstance(size, int) and not 1 <= size <= most:
            raise ValueError(f"{name} is {size}")
    classes = (
        transformers.AutoModelForSequenceClassification
        if is_scalar_config(config)
        else (transformers.AutoModelForCausalLM)
    )
    if type(config) in classes._model_mapping:  # what is of no such kind is refused by what loads it
        with torch.device("meta"):
            classes.from_config(config)


@contextlib.contextmanager
def _named(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{name}: {path} cannot be read: {error.strerror or reason_of(error)}") from None
    except SafetensorError as error:
        raise UserError(
            f"{name}: {path} is damaged and cannot be loaded: {reason_of(error)}: copy or download it again"
        ) from None
    except Exception as error:  # libraries check little, and fail anywhere
        raise UserError(f"{name}: {path} describes no model: {type(error).__name__}: {reason_of(error)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is odd is said when the model is loaded, once."""
    usual = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(usual)
