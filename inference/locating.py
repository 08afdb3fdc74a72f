"""What a --path stands for: which weights, which adapter, which tokenizer, and how they were made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.artifacts.provenance import Provenance, read_provenance
from common.errors import UserError
from common.models.adapter import (
    ADAPTER_CONFIG,
    adapter_provenance,
    holds_adapter,
    merged_model,
    read_adapter,
    refuse_adapter,
)
from common.models.loading import resolve_model


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


def find_model(
    path: str,
    flag: str,
    cache_dir: str,
    base: str | None = None,
    *,
    merge_adapter: bool = False,
    cure: str = "add --merge_adapter",
) -> ModelFiles:
    """The files behind a model directory, a step's output directory, an adapter's directory or a hub name.

    Of the output of step 3 it is the actor that is meant.

    Args:
        cache_dir: where built-in models are kept.
        base: replaces the base model that an adapter names.
        merge_adapter: an adapter beside a whole model is laid over that; else it is refused with `cure` as what to do.

    Raises:
        UserError: there is no such model.
    """
    name, directory = f"{flag} {path}", Path(path)
    if not (directory / "config.json").exists() and (directory / "actor" / "config.json").exists():
        directory = directory / "actor"
    if holds_adapter(directory):
        if base is None and (directory / "config.json").exists():
            if not merge_adapter:
                refuse_adapter(directory, name, cure)
            merged = str(merged_model(directory, flag, Path(cache_dir)))
            return ModelFiles(name, flag, merged, None, merged, False, read_provenance(merged))
        return _find_adapter(directory, name, cache_dir, base)
    if not (directory / "config.json").exists() and (inside := adapters_inside(directory)):
        raise UserError(f"{name} holds adapters, but is none itself: name {' or '.join(map(str, inside))}")
    if base is not None:
        raise UserError(f"{name} is no adapter, so --base has no use: it holds no {ADAPTER_CONFIG}")
    source = resolve_model(str(directory) if directory.is_dir() else path, flag, Path(cache_dir))
    return ModelFiles(name, flag, source, None, source, False, read_provenance(source))


def adapters_inside(directory: Path) -> list[Path]:
    """The adapters in a step's output directory, or in the directory where it keeps those of several models."""
    return sorted(path.parent for level in ("*", "adapter/*") for path in directory.glob(f"{level}/{ADAPTER_CONFIG}"))


def _find_adapter(directory: Path, name: str, cache_dir: str, base: str | None) -> ModelFiles:
    named, scores = read_adapter(directory, name)
    named = base or named
    if not named:
        raise UserError(
            f"{name}: the adapter does not name its base model: merge it with inference/merge_lora.py --base"
        )
    flag = "--base" if base else f"{name}: the adapter's base model (--base of inference/merge_lora.py names another)"
    weights = resolve_model(named, flag, Path(cache_dir))
    own = (directory / "tokenizer_config.json").is_file()
    return ModelFiles(
        name, flag, weights, directory, str(directory) if own else weights, scores, adapter_provenance(directory)
    )
