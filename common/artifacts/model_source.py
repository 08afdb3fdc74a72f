"""Finds the directory or hub name to load a model from; an adapter is merged with its base model first."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn

from common.artifacts.provenance import Provenance, read_provenance
from common.data.tokenization import Codec, load_tokenizer, make_codec
from common.errors import InputError, ModelError, RemoteCodeError, reason_of
from common.models.adapter import holds_adapter, read_adapter
from common.models.builtin import BUILTIN_MODELS, materialise
from common.models.checks import check_files, check_model_name
from common.models.configuration import explained, gives_scores
from common.models.loading import load_causal_lm, load_scoring_model
from common.paths import content_digest
from common.runtime.distributed import is_main
from common.runtime.hub import announce_lookup

# The files of a model directory that the merged model depends on.
_READ = (".json", ".safetensors", ".bin", ".model", ".py", ".jinja", ".txt")


def resolve_model(name: str, cache_dir: str | Path, merge_adapter: bool = False) -> str:
    """The directory or hub name to load a model from. A built-in model is written to the cache first.

    Args:
        merge_adapter: for a directory with an adapter, merge that with its base model and return the merged model's
            directory in the cache.

    Raises:
        ModelError: there is no such model, its files are damaged, or it has an adapter that is not to be merged.
        OSError: the cache cannot be written.
    """
    check_model_name(name, merge_adapter)
    if name in BUILTIN_MODELS:
        return str(materialise(name, cache_dir))
    path = Path(name)
    if merge_adapter and holds_adapter(path):
        return str(merged_model(path, Path(cache_dir)))
    if path.is_dir():
        check_files(path)
        return str(path)
    announce_lookup(name)
    return name


def base_of(adapter: Path, cache_dir: str | Path, hint: str = "") -> str:
    """The directory or hub name of the base model that an adapter names.

    Args:
        hint: see `errors_of_base`.

    Raises:
        ModelError: the adapter names no base model, or there is no such model.
        OSError: the cache cannot be written.
    """
    name, _ = read_adapter(adapter)
    if not name:
        raise ModelError(
            adapter,
            "the adapter does not name its base model: name it with "
            f"`python inference/merge_lora.py --path {adapter} --base MODEL --output_dir MERGED`",
        )
    with errors_of_base(adapter, hint):
        return resolve_model(name, cache_dir)


@contextmanager
def errors_of_base(adapter: Path, hint: str = "") -> Iterator[None]:
    """Within the context, an error about the base model becomes a ModelError of the adapter.

    Args:
        hint: what else to say of the base model, such as how to name another one.
    """
    try:
        yield
    except InputError as error:
        kind = RemoteCodeError if isinstance(error, RemoteCodeError) else ModelError
        raise kind(adapter, f"the adapter's base model{hint} {error}") from error.__cause__


def adapter_provenance(directory: Path) -> Provenance | None:
    """The provenance of an adapter.

    An adapter directory lies in the output directory of its step, beside provenance.json. A step with several models
    keeps their adapters one level deeper: `adapter/actor`, `adapter/critic`.
    """
    output = directory.parent if directory.parent.name == "adapter" else directory
    return read_provenance(directory) or read_provenance(output)


def merged_model(directory: Path, cache_dir: Path) -> Path:
    """Merge an adapter with its base model into a directory in `cache_dir`, unless that exists, and return it.

    The base is the model in the same directory if there is one, else the model that the adapter names. Weights are
    added and saved in fp32. Several processes may call this at once.

    Raises:
        ModelError: there is no such base, or the adapter does not fit it.
        OSError: the cache cannot be written.
    """
    has_own_base = (directory / "config.json").is_file()
    base = str(directory) if has_own_base else base_of(directory, cache_dir)
    merged = cache_dir / f"merged-{_digest(directory, base)}"
    draft = merged.with_name(f".{merged.name}-{os.getpid()}")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # The directory appears by a rename, so it is complete. A read-only cache needs no lock then.
        with nullcontext() if merged.is_dir() else FileLock(cache_dir / "merged.lock"):
            if not merged.is_dir():
                with _without_adapter(directory) if has_own_base else nullcontext(base) as weights:
                    _write_merged(directory, weights, base, draft)
                os.rename(draft, merged)
    except (OSError, SafetensorError) as error:
        raise OSError(f"merging the adapter in {directory}: {reason_of(error)}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if is_main():  # on stderr: the responses of inference/generate.py go to stdout
        print(
            f"{directory}: the adapter is merged with {'the model beside it' if has_own_base else base} into {merged}",
            file=sys.stderr,
            flush=True,
        )
    return merged


def _write_merged(adapter: Path, weights: str, tokenizer: str, draft: Path) -> None:
    from peft import PeftModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    _, has_head = read_adapter(adapter)
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    provenance = adapter_provenance(adapter)
    codec = _codec(str(adapter) if own_tokenizer else tokenizer, provenance)
    model: nn.Module
    with explained(adapter):
        with errors_of_base(adapter):
            if has_head or gives_scores(weights):
                model = load_scoring_model(weights, codec, dtype=torch.float32).classifier
            else:
                model = load_causal_lm(weights, codec, dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.config.use_cache = True
    merged.save_pretrained(draft)
    codec.tokenizer.save_pretrained(draft)
    if provenance is not None:
        provenance.write(draft)


def _codec(tokenizer: str, provenance: Provenance | None) -> Codec:
    loaded = load_tokenizer(tokenizer)
    if provenance is None:
        return make_codec(loaded, "human_assistant")  # any template will do: no text is encoded
    return make_codec(
        loaded,
        provenance.template,
        add_eot_token=provenance.end_token != loaded.eos_token,
        eot_token=provenance.end_token,
    )


@contextmanager
def _without_adapter(directory: Path) -> Iterator[str]:
    """Within the context, a directory with links to all files but the adapter's, which transformers would load too."""
    with tempfile.TemporaryDirectory() as alone:
        for path in directory.iterdir():
            if not path.name.startswith("adapter"):
                (Path(alone) / path.name).symlink_to(path.absolute())
        yield alone


def _digest(adapter: Path, base: str) -> str:
    """A hash of the content of both directories; for a base on the hub, of its name."""
    directories = [adapter, *([Path(base)] if Path(base).is_dir() else [])]
    files = [
        path
        for directory in directories
        for path in sorted(directory.iterdir())
        if path.suffix in _READ and path.is_file()
    ]
    names = [path.name for path in files]
    provenance = adapter_provenance(adapter)
    return hashlib.sha256(f"{base}\n{names}\n{provenance}\n{content_digest(files)}".encode()).hexdigest()[:16]
