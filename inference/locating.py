"""Finds the weights, adapter, tokenizer and provenance that a --path names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.artifacts.model_source import adapter_provenance, base_of, errors_of_base, merged_model, resolve_model
from common.artifacts.provenance import Provenance, read_provenance
from common.errors import ModelError
from common.models.adapter import ADAPTER_CONFIG, holds_adapter, read_adapter, refuse_adapter


@dataclass(frozen=True)
class ModelFiles:
    """
    Attributes:
        path: as the user gave it, for messages.
        weights: directory or hub name of the model, or of the base model if there is an adapter.
        adapter: directory of the adapter to merge with it.
        tokenizer: directory or hub name of the tokenizer.
        has_score_head: whether the adapter comes with a score head, so that the merged model is a reward model.
        provenance: how the model was trained, if this project trained it.
    """

    path: str
    weights: str
    adapter: Path | None
    tokenizer: str
    has_score_head: bool
    provenance: Provenance | None

    @contextmanager
    def loading_weights(self) -> Iterator[None]:
        """Within the context an error about the weights of a base model names the adapter that needs it."""
        if self.adapter is None:
            yield
            return
        with errors_of_base(self.adapter, _ANOTHER_BASE):
            yield


_ANOTHER_BASE = " (`python inference/merge_lora.py --base MODEL` names another)"


def find_model(path: str, cache_dir: str, base: str | None = None, *, merge_adapter: bool = False) -> ModelFiles:
    """The files of a model directory, of a step's output directory, of an adapter's directory or of a hub name.

    The output directory of step 3 means the actor in it.

    Args:
        cache_dir: where built-in and merged models are kept.
        base: replaces the base model that an adapter names; for any other model it has no use.
        merge_adapter: merge an adapter that lies beside a whole model.

    Raises:
        AdapterError: an adapter lies beside a whole model, and is not to be merged.
        ModelError: there is no such model.
        OSError: the cache cannot be written.
    """
    directory = Path(path)
    if not (directory / "config.json").exists() and (directory / "actor" / "config.json").exists():
        directory = directory / "actor"
    if holds_adapter(directory):
        if base is None and (directory / "config.json").exists():
            if not merge_adapter:
                refuse_adapter(directory)
            merged = str(merged_model(directory, Path(cache_dir)))
            return ModelFiles(path, merged, None, merged, False, read_provenance(merged))
        return _find_adapter(path, directory, cache_dir, base)
    if not (directory / "config.json").exists() and (inside := adapters_inside(directory)):
        raise ModelError(path, f"it holds adapters, but is none itself: name {' or '.join(map(str, inside))}")
    source = resolve_model(str(directory) if directory.is_dir() else path, cache_dir)
    return ModelFiles(path, source, None, source, False, read_provenance(source))


def adapters_inside(directory: Path) -> list[Path]:
    """The adapters in a step's output directory, or in the directory where it keeps those of several models."""
    return sorted(path.parent for level in ("*", "adapter/*") for path in directory.glob(f"{level}/{ADAPTER_CONFIG}"))


def _find_adapter(path: str, directory: Path, cache_dir: str, base: str | None) -> ModelFiles:
    _, has_score_head = read_adapter(directory)
    weights = resolve_model(base, cache_dir) if base else base_of(directory, cache_dir, _ANOTHER_BASE)
    own_tokenizer = (directory / "tokenizer_config.json").is_file()
    return ModelFiles(
        path,
        weights,
        directory,
        str(directory) if own_tokenizer else weights,
        has_score_head,
        adapter_provenance(directory),
    )
