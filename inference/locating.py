"""What a --path stands for: which weights, which adapter, which tokenizer, and how they were made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.models.factory import resolve_model
from common.provenance import Provenance, read_provenance

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelFiles:
    """
    Attributes:
        name: flag and path as the user gave them, for messages; `flag`: what stands there before `weights`.
        weights: directory or hub name of the model, of the base model if there is an adapter.
        adapter: directory of the adapter to lay over it.
        tokenizer: directory or hub name of the tokenizer.
        scores: whether the adapter comes with a score head, so that the whole is a reward model.
        provenance: how the model was trained, if this project trained it.
    """

    name: str
    flag: str
    weights: str
    adapter: Path | None
    tokenizer: str
    scores: bool
    provenance: Provenance | None


def find_model(path: str, flag: str, cache_dir: str, base: str | None = None) -> ModelFiles:
    """The files behind a model directory, a step's output directory, an adapter's directory or a hub name.

    Of the output of step 3 it is the actor that is meant.

    Args:
        cache_dir: where built-in models are kept.
        base: replaces the base model that an adapter names.

    Raises:
        UserError: there is no such model.
    """
    name, directory = f"{flag} {path}", Path(path)
    if not (directory / "config.json").exists() and (directory / "actor" / "config.json").exists():
        directory = directory / "actor"
    if (directory / _ADAPTER_CONFIG).is_file():
        return _find_adapter(directory, name, cache_dir, base)
    if not (directory / "config.json").exists() and (inside := adapters_inside(directory)):
        raise UserError(f"{name} holds adapters, but is none itself: name {' or '.join(map(str, inside))}")
    if base is not None:
        raise UserError(f"{name} is no adapter, so --base has no use: it holds no {_ADAPTER_CONFIG}")
    source = resolve_model(str(directory) if directory.is_dir() else path, flag, Path(cache_dir))
    return ModelFiles(name, flag, source, None, source, False, read_provenance(source))


def adapters_inside(directory: Path) -> list[Path]:
    """The adapters in a step's output directory, or in the directory where it keeps those of several models."""
    return sorted(path.parent for level in ("*", "adapter/*") for path in directory.glob(f"{level}/{_ADAPTER_CONFIG}"))


def _find_adapter(directory: Path, name: str, cache_dir: str, base: str | None) -> ModelFiles:
    try:
        config = json.loads((directory / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
        named = base or config["base_model_name_or_path"]
        scores = "score" in (config.get("modules_to_save") or ())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{name}: {directory / _ADAPTER_CONFIG} is damaged "
                        f"({type(error).__name__}: {error})") from None
    if not named:
        raise UserError(f"{name}: the adapter does not name its base model: merge it with "
                        "inference/merge_lora.py --base")
    flag = "--base" if base else f"{name}: the adapter's base model (--base of inference/merge_lora.py names another)"
    weights = resolve_model(named, flag, Path(cache_dir))
    own = (directory / "tokenizer_config.json").is_file()
    # A step with several models keeps its adapters one level deeper.
    inside = directory.parent if directory.parent.name == "adapter" else directory
    return ModelFiles(name, flag, weights, directory, str(directory) if own else weights, scores,
                      read_provenance(directory) or read_provenance(inside))
