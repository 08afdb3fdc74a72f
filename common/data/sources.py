"""Finds the rows of a source: `builtin:NAME`, a local file, a directory or zip archive of files, a saved data set, or a
hub data set.

A local path takes precedence over a hub name. A source consists of parts (files, splits). Each part belongs to training
or to the source's own test data, see `splits`.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.data import builtin
from common.data.blend import SourceSpec
from common.data.errors import SourceError
from common.data.files import UNDERSTOOD, Row, is_data_file, is_plain_text, kind_of, members, read_rows
from common.data.rows import FileFormat, Note, ignore
from common.data.splits import choose_splits
from common.errors import UserError
from common.paths import content_digest, edges_digest, may_be_on_hub, similar_path, unreachable_hub
from common.runtime.hub import announce_lookup

_BUILTIN = "builtin:"
# Names of plain texts that lie beside data and are about it.
_ABOUT = {"readme", "license", "licence", "notice", "changelog", "requirements"}
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Part:
    """A file or split of a source.

    Attributes:
        label: its name in messages and in the places of rows.
        name: its name within the source.
        split: "train", "test" or "excluded": test data for another kind of record, which is not read as records but
            whose prompts must not be trained on either.
        rows: yields its rows; takes a `Note` that is called with remarks about the file.
        digest: a hash of its content.
        table: gives its rows as an IterableDataset of `datasets`, which can go on from a place; None for files.
    """

    label: str
    name: str
    split: str
    rows: Callable[..., Iterator[Row]]
    digest: Callable[[], str]
    table: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Source:
    parts: list[Part]
    left_out: list[str] = field(default_factory=list)  # names of parts that belong to no split
    notes: list[str] = field(default_factory=list)


def open_source(spec: SourceSpec, kind: str | None = None) -> Source:
    """The parts of a source, in an order that depends on their names alone. Reads no rows yet.

    Args:
        kind: the wanted kind of record, which selects parts where a source has splits for several; None: all parts.

    Raises:
        SourceError: the source does not exist, holds no data or cannot be reached.
        UserError: an archive or another file in it cannot be read.
    """
    source = local_source(spec, kind)
    if source is None:
        announce_lookup(spec.name)
        source = hub_source(spec, kind)
    return source


def local_source(spec: SourceSpec, kind: str | None = None) -> Source | None:
    """A builtin task or a path as a source; None for a name that may be on the hub. Raises as `open_source`."""
    if spec.name.startswith(_BUILTIN):
        return _builtin(spec)
    path = Path(spec.name)
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, a directory on the way that cannot be entered
        raise SourceError(spec.name, f"cannot be read: {error.strerror}") from None
    if path.is_file():
        inside = members(path, spec.name)
        if inside:
            return _of_files(spec, {name: (path, name) for name in inside}, kind)
        if not is_data_file(path):
            raise SourceError(spec.name, f"it is {kind_of(path) or 'no data file'}; understood are {UNDERSTOOD}")
        return Source([_file_part(path, spec.name, path.name, "train", spec.form, _digest_of(path, spec))])
    if path.is_dir():
        return _directory(spec, path, kind)
    if path.exists():
        raise SourceError(spec.name, "it is neither a file nor a directory; write what it gives to a file")
    if is_data_file(path) or not may_be_on_hub(spec.name):
        raise SourceError(
            spec.name,
            "it does not exist; name a file, a directory, builtin:courtesy or a hub data set (name or owner/name)"
            f"{similar_path(path)}",
        )
    return None


def _builtin(spec: SourceSpec) -> Source:
    task = spec.name.removeprefix(_BUILTIN)
    version = builtin.builtin_version(task)
    return Source(
        [
            Part(
                spec.name,
                task,
                "train",
                lambda note=ignore: _numbered(builtin.builtin_rows(task), spec.name),
                lambda: version,
            )
        ]
    )


def _numbered(rows: Any, label: str) -> Iterator[Row]:
    for number, values in enumerate(rows, 1):
        yield Row(f"{label}:{number}", values)


def _file_part(
    path: Path,
    label: str,
    name: str,
    split: str,
    form: FileFormat,
    digest: Callable[[], str],
    member: str | None = None,
) -> Part:
    return Part(label, name, split, lambda note=ignore: read_rows(path, label, form, note, member), digest)


def _digest_of(path: Path, spec: SourceSpec) -> Callable[[], str]:
    """A hash of the file's content, taken once for all members of an archive."""
    return functools.cache(lambda: _file_digest([path], spec))


def _file_digest(paths: list[Path], spec: SourceSpec) -> str:
    try:
        return edges_digest(paths) if spec.streamed else content_digest(paths)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error}") from error


def _directory(spec: SourceSpec, path: Path, kind: str | None) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(spec, path, kind)
    try:
        os.listdir(path)  # rglob takes a directory that cannot be read for an empty one
    except OSError as error:
        raise SourceError(spec.name, f"the directory cannot be read: {error.strerror}") from None
    inside = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    data = {
        name: file
        for name, file in inside.items()
        if is_data_file(file)
        and file.name not in _METADATA
        and not any(part.startswith(".") for part in name.split("/"))
        and not (is_plain_text(name) and file.name.lower().partition(".")[0] in _ABOUT)
    }
    # Beside data, a text is taken to be about the data, and an archive to hold the same data again.
    aside = [name for name in data if is_plain_text(name) or name.lower().endswith(".zip")]
    if len(aside) == len(data):
        aside = []
    files: dict[str, tuple[Path, str | None]] = {}
    for name in data.keys() - set(aside):
        within = members(data[name], os.path.join(spec.name, name))
        files |= (
            {name: (data[name], None)}
            if within is None
            else {f"{name}/{member}": (data[name], member) for member in within}
        )
    if not files:
        raise SourceError(spec.name, f"the directory holds no data file; understood are {UNDERSTOOD}")
    source = _of_files(spec, files, kind)
    if aside:
        source.notes.append(f"{spec.name}: left out, being texts or archives beside data: {', '.join(sorted(aside))}")
    return source


def _of_files(spec: SourceSpec, files: dict[str, tuple[Path, str | None]], kind: str | None) -> Source:
    """A source of files: name -> (path, member of the zip archive at that path, or None)."""
    names = sorted(files)
    choice = choose_splits(names, kind)
    digests = {path: _digest_of(path, spec) for path, _ in files.values()}
    parts = []
    for name in (name for name in names if name in choice.splits):
        path, member = files[name]
        parts.append(
            _file_part(path, os.path.join(spec.name, name), name, choice.splits[name], spec.form, digests[path], member)
        )
    return Source(parts, choice.left_out, [f"{spec.name}: {remark}" for remark in choice.notes])


def _saved(spec: SourceSpec, path: Path, kind: str | None) -> Source:
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # a damaged directory can raise anything
        raise SourceError(spec.name, f"it is no readable saved data set: {_first_line(error)}") from error
    if isinstance(saved, Dataset):
        tables, folders = {"train": saved}, {"train": path}
    else:
        tables, folders = dict(saved), {name: path / name for name in saved}
    return _from_tables(spec, tables, lambda name: _file_digest(sorted(folders[name].glob("*.arrow")), spec), kind)


def hub_source(spec: SourceSpec, kind: str | None = None) -> Source:
    """The training split of a hub data set and its own test and validation splits, if any."""
    if spec.streamed:
        builder = _hub_builder(spec.name, spec.config_name)
        return _from_tables(spec, dict(builder.as_streaming_dataset()), lambda name: f"{builder.hash}/{name}", kind)
    tables = _load_hub(spec.name, spec.config_name)
    return _from_tables(spec, tables, lambda name: tables[name]._fingerprint, kind)


@functools.cache
def _load_hub(name: str, config_name: str | None) -> dict[str, Any]:
    from datasets import load_dataset

    return dict(_from_hub(load_dataset, name, config_name))


@functools.cache
def _hub_builder(name: str, config_name: str | None) -> Any:
    """What streams a hub data set; its hash is that of the data set's version."""
    from datasets import load_dataset_builder

    return _from_hub(load_dataset_builder, name, config_name)


def _from_hub(load: Callable[..., Any], name: str, config_name: str | None) -> Any:
    from datasets import config

    try:
        try:
            return load(name, config_name)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # The programs that define some sets are not run; the hub keeps a converted copy of each on this branch.
            return load(name, config_name, revision="refs/convert/parquet")
    except Exception as error:  # unreachable, unknown, gated, no such configuration: each has its own class
        reason = unreachable_hub(error, str(config.HF_DATASETS_CACHE)) or _first_line(error)
        raise SourceError(
            name,
            f"it is no local path, and it cannot be loaded as a hub data set: {reason}{similar_path(Path(name))}",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _from_tables(spec: SourceSpec, tables: dict[str, Any], digest: Callable[[str], str], kind: str | None) -> Source:
    choice = choose_splits(list(tables), kind)
    parts = []
    for name, split in choice.splits.items():
        label = f"{spec.name}[{name}]"
        parts.append(
            Part(
                label,
                name,
                split,
                functools.partial(_table_rows, tables[name], label),
                functools.partial(digest, name),
                functools.partial(_iterable, tables[name]),
            )
        )
    return Source(parts, choice.left_out, [f"{spec.name}: {remark}" for remark in choice.notes])


def _table_rows(table: Any, label: str, note: Note = ignore) -> Iterator[Row]:
    return _numbered(table, label)


def _iterable(table: Any) -> Any:
    """A table as an IterableDataset of its own, which is at its beginning."""
    from datasets import Dataset

    return table.to_iterable_dataset() if isinstance(table, Dataset) else copy.deepcopy(table)
