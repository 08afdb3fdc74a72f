"""Where rows come from: ``builtin:NAME``, a local file, a directory of files, a saved data set, a hub data
set.

A local path wins over a hub name. A source consists of parts (files, splits), each of which belongs to
training or to the source's own test data. Splits are told from names as the hub does: a part named after
train, or after test, validation, dev or eval; if some are named after train, those named after none are left
out; if none is, those named after none are for training, and if all are test data, they are the source's
data.
"""
from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data import builtin
from common.data.blend import SourceSpec
from common.data.files import SUFFIXES, Row, is_data_file, read_rows
from common.errors import UserError
from common.paths import announce_lookup, content_digest, may_be_on_hub, similar_path

_BUILTIN = "builtin:"
_TRAIN = {"train", "training"}
_TEST = {"test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation"}
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Part:
    """``label``: what messages and rows' places call it; ``name``: within its source; ``split``: 'train' or
    'test'; ``digest``: a hash of its content."""

    label: str
    name: str
    split: str
    rows: Callable[[], Iterator[Row]]
    digest: Callable[[], str]


@dataclass(frozen=True)
class Source:
    parts: list[Part]
    left_out: list[str]     # names of parts that belong to no split


def open_source(spec: SourceSpec) -> Source:
    """The parts of a source, in an order that depends on their names alone. Reads no rows yet.

    Raises UserError if the source does not exist, holds no data or cannot be reached.
    """
    source = local_source(spec)
    if source is None:
        announce_lookup(spec.name)
        source = hub_source(spec)
    return source


def local_source(spec: SourceSpec) -> Source | None:
    """A builtin task or a path as a source; None for what may be a name on the hub. Raises UserError for neither."""
    if spec.name.startswith(_BUILTIN):
        return _builtin(spec)
    path = Path(spec.name)
    if path.is_file():
        if not is_data_file(path):
            raise UserError(f"{spec.flag}: {spec.name} is no data file; understood are {', '.join(SUFFIXES)}")
        return Source([_file_part(path, spec.name, path.name, "train")], [])
    if path.is_dir():
        return _directory(spec, path)
    if is_data_file(path) or not may_be_on_hub(spec.name):
        raise UserError(f"{spec.flag}: {spec.name} does not exist; name a file, a directory, "
                        f"builtin:courtesy or a hub data set (name or owner/name){similar_path(path)}")
    return None


def _builtin(spec: SourceSpec) -> Source:
    task = spec.name.removeprefix(_BUILTIN)
    version = builtin.builtin_version(task)
    return Source([Part(spec.name, task, "train", lambda: _numbered(builtin.builtin_rows(task), spec.name),
                        lambda: version)], [])


def _numbered(rows: Any, label: str) -> Iterator[Row]:
    for number, values in enumerate(rows, 1):
        yield Row(f"{label}:{number}", values)


def _file_part(path: Path, label: str, name: str, split: str) -> Part:
    return Part(label, name, split, lambda: read_rows(path, label), lambda: _file_digest([path]))


def _file_digest(paths: list[Path]) -> str:
    try:
        return content_digest(paths)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error}") from error


def _directory(spec: SourceSpec, path: Path) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(spec, path)
    inside = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    names = sorted(name for name, file in inside.items() if is_data_file(file) and file.name not in _METADATA
                   and not any(part.startswith(".") for part in name.split("/")))
    if not names:
        raise UserError(f"{spec.flag}: the directory {spec.name} holds no data file; "
                        f"understood are {', '.join(SUFFIXES)}")
    splits = _splits(names)
    return Source([_file_part(inside[name], os.path.join(spec.name, name), name, splits[name])
                   for name in names if name in splits], [name for name in names if name not in splits])


def _saved(spec: SourceSpec, path: Path) -> Source:
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # whatever the library meets in a damaged directory
        raise UserError(f"{spec.flag}: {spec.name} is no readable saved data set: "
                        f"{_first_line(error)}") from error
    if isinstance(saved, Dataset):
        tables, folders = {"train": saved}, {"train": path}
    else:
        tables, folders = dict(saved), {name: path / name for name in saved}
    return _from_tables(spec, tables, lambda name: _file_digest(sorted(folders[name].glob("*.arrow"))))


def hub_source(spec: SourceSpec) -> Source:
    """The training split of a hub data set and its own test and validation splits, if any."""
    tables = _load_hub(spec.name, spec.config_name, spec.flag)
    return _from_tables(spec, tables, lambda name: tables[name]._fingerprint)


@functools.lru_cache(maxsize=None)
def _load_hub(name: str, config_name: str | None, flag: str) -> dict[str, Any]:
    from datasets import load_dataset

    try:
        try:
            return dict(load_dataset(name, config_name))
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # Sets defined by a program are not run; the hub keeps a converted copy of each on this branch.
            return dict(load_dataset(name, config_name, revision="refs/convert/parquet"))
    except Exception as error:  # unreachable, unknown, gated, no such configuration: each has its own class
        raise UserError(f"{flag}: {name} is no local path, and it cannot be loaded as a hub data set: "
                        f"{_first_line(error)}{similar_path(Path(name))}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _from_tables(spec: SourceSpec, tables: dict[str, Any], digest: Callable[[str], str]) -> Source:
    splits = _splits(list(tables))
    parts = []
    for name, split in splits.items():
        label = f"{spec.name}[{name}]"
        parts.append(Part(label, name, split, functools.partial(_numbered, tables[name], label),
                          functools.partial(digest, name)))
    return Source(parts, [name for name in tables if name not in splits])


def _splits(names: list[str]) -> dict[str, str]:
    """Part name -> 'train' or 'test', in the order of ``names``, without those that belong to no split."""
    splits = {name: _split_in_name(name) for name in names}
    if "train" in splits:
        # An exact name leaves no doubt; 'train_sft' and the like beside it hold the same rows again.
        splits = {name: split for name, split in splits.items() if split != "train" or name == "train"}
    if "train" in splits.values():
        return {name: split for name, split in splits.items() if split}
    if None in splits.values():
        return {name: split or "train" for name, split in splits.items()}
    return dict.fromkeys(splits, "train")


def _split_in_name(name: str) -> str | None:
    """The split a name speaks of; of several components of a path, the last that speaks decides."""
    for component in reversed(name.lower().split("/")):
        words = re.split(r"[^a-z]+", component)
        if not _TRAIN.isdisjoint(words):
            return "train"
        if not _TEST.isdisjoint(words):
            return "test"
    return None
