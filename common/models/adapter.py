"""Adapters (LoRA, as peft saves them) where a model is looked for: named, refused, or laid over their base for good."""

from __future__ import annotations

import hashlib
import json
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

from common.artifacts.provenance import Provenance, read_provenance
from common.data.tokenization import Codec, load_tokenizer, make_codec
from common.errors import UserError, reason_of
from common.paths import content_digest
from common.runtime.distributed import is_main

ADAPTER_CONFIG = "adapter_config.json"
_READ = (".json", ".safetensors", ".bin", ".model", ".py", ".jinja", ".txt")


def holds_adapter(directory: Path) -> bool:
    """Whether transformers would lay an adapter over what it loads from here, and train nothing but that."""
    return (directory / ADAPTER_CONFIG).is_file()


def refuse_adapter(directory: Path, name: str, cure: str) -> None:
    """Raises UserError if the model directory `name` holds an adapter too; `cure` is what lays it over the model."""
    if not holds_adapter(directory):
        return
    if (directory / "config.json").is_file():
        raise UserError(
            f"{name}: an adapter ({ADAPTER_CONFIG}) lies beside the whole model, which may or may not have "
            f"it merged already: {cure}, or move the adapter's files elsewhere to take the model alone"
        )
    raise UserError(
        f"{name} is an adapter without its base model: make one model of them with "
        f"`python inference/merge_lora.py --path {directory} --output_dir MERGED`, or {cure}"
    )


def read_adapter(directory: Path, name: str) -> tuple[str | None, bool]:
    """The base model that an adapter names, and whether it comes with a score head.

    Raises:
        UserError: its configuration is damaged.
    """
    path = directory / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config["base_model_name_or_path"], "score" in (config.get("modules_to_save") or ())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: {path} is damaged ({type(error).__name__}: {error})") from None


def adapter_provenance(directory: Path) -> Provenance | None:
    """How an adapter was trained; a step with several models keeps its adapters one level deeper."""
    inside = directory.parent if directory.parent.name == "adapter" else directory
    return read_provenance(directory) or read_provenance(inside)


def merged_model(directory: Path, flag: str, cache_dir: Path) -> Path:
    """The directory in `cache_dir` of the one model that an adapter and its base make, written on the first call.

    The base is the whole model beside the adapter, or else the one that the adapter names. The sum is done and saved in
    fp32. Safe to call from several processes at once.

    Raises:
        UserError: there is no such base, or the two do not fit.
    """
    from common.models.loading import resolve_model

    name = f"{flag} {directory}"
    beside = (directory / "config.json").is_file()
    named, scores = read_adapter(directory, name)
    if not beside and not named:
        raise UserError(
            f"{name}: the adapter does not name its base model: merge it with inference/merge_lora.py --base"
        )
    base = str(directory) if beside else resolve_model(named, f"{name}: the adapter's base model", cache_dir)
    place = cache_dir / f"merged-{_digest(directory, base)}"
    draft = place.with_name(f".{place.name}-{os.getpid()}")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # What is in place is whole; a cache that may only be read needs no lock then.
        with nullcontext() if place.is_dir() else FileLock(cache_dir / "merged.lock"):
            if not place.is_dir():
                with _alone(directory) if beside else nullcontext(base) as weights:
                    _write_merged(directory, weights, base, name, scores, draft)
                os.rename(draft, place)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{name}: the sum with its adapter cannot be written to --data_output_path {cache_dir}: {reason_of(error)}"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if is_main():  # on stderr: the answers of inference/generate.py go to stdout
        print(
            f"{name}: the adapter is laid over {'the model beside it' if beside else base}; their sum is in {place}",
            file=sys.stderr,
            flush=True,
        )
    return place


def _write_merged(adapter: Path, weights: str, tokenizer: str, name: str, scores: bool, draft: Path) -> None:
    from peft import PeftModel
    from transformers.utils import logging

    from common.models.loading import explained, gives_scores, load_causal_lm, load_scalar_model

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    own = (adapter / "tokenizer_config.json").is_file()
    provenance = adapter_provenance(adapter)
    codec = _codec(str(adapter) if own else tokenizer, provenance)
    with explained(name):
        if scores or gives_scores(weights, name):
            model = load_scalar_model(weights, name, codec, dtype=torch.float32).classifier
        else:
            model = load_causal_lm(weights, name, codec, dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.config.use_cache = True
    merged.save_pretrained(draft)
    codec.tokenizer.save_pretrained(draft)
    if provenance is not None:
        provenance.write(draft)


def _codec(tokenizer: str, provenance: Provenance | None) -> Codec:
    loaded = load_tokenizer(tokenizer)
    if provenance is None:
        return make_codec(loaded, "human_assistant")  # no text is written by it
    return make_codec(
        loaded,
        provenance.template,
        add_eot_token=provenance.end_token != loaded.eos_token,
        eot_token=provenance.end_token,
    )


@contextmanager
def _alone(directory: Path) -> Iterator[str]:
    """A directory of the model without its adapter, which transformers would load unasked."""
    with tempfile.TemporaryDirectory() as alone:
        for path in directory.iterdir():
            if not path.name.startswith("adapter"):
                (Path(alone) / path.name).symlink_to(path.absolute())
        yield alone


def _digest(adapter: Path, base: str) -> str:
    """Of the content of both; of a base on the hub its name."""
    places = [adapter, *([Path(base)] if Path(base).is_dir() else [])]
    files = [path for place in places for path in sorted(place.iterdir()) if path.suffix in _READ and path.is_file()]
    names = [path.name for path in files]
    provenance = adapter_provenance(adapter)
    return hashlib.sha256(f"{base}\n{names}\n{provenance}\n{content_digest(files)}".encode()).hexdigest()[:16]
