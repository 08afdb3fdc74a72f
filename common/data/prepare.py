"""Turns records into ids once, and writes them to Arrow files that every rank and later start maps into memory."""

from __future__ import annotations

import functools
import hashlib
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from datasets.arrow_writer import ArrowWriter

from common.data.encoding import Encoder, chunks, features
from common.data.file_lock import locked
from common.data.openings import all_keys
from common.data.parallel import in_order
from common.data.preparation_report import PreparationReport
from common.data.prepared_files import Damaged, OtherFormat, seal, unseal
from common.data.reading import SourcedRecord, read_records
from common.data.records import Prompt, user_turns
from common.data.request import DataRequest, data_key
from common.data.split import assignment, parse_data_split, parse_split_by
from common.data.tokenization import Codec
from common.errors import DataError, UserError
from common.paths import NotWritable, checked_writing
from common.runtime.distributed import gather_objects

_TEST_PROMPTS = "tested.npy"


@dataclass(frozen=True)
class PreparedData:
    """Memory-mapped rows of ids.

    Columns by kind: demonstration: `prompt_ids`, `response_ids`; comparison: `prompt_ids`, `chosen_ids`,
    `rejected_ids`, and `margin` if the request names its column; feedback: `prompt_ids`, `response_ids`, `desirable`;
    prompt: `prompt_ids`, and `kept` where columns are kept, see `keeping`; text: `input_ids`. Always `length`, the
    tokens of the row's longest sequence, and `dialogue`, see `common.data.openings.SplitKey`.

    Attributes:
        train, eval: the rows to train and to evaluate on.
        test_prompt_hashes: (N,) int64, `SplitKey.dialogue` of the dialogues that must not be trained on, under any
            rule: all prompts of the sources' own test data, whatever became of their rows, and those held out.
        report: what became of the rows.
        key: see `common.data.request.data_key`.
    """

    train: Dataset
    eval: Dataset
    test_prompt_hashes: np.ndarray
    report: PreparationReport
    key: str


def prepare(request: DataRequest, codec: Codec) -> PreparedData:
    """The data of a step, from the cache if it has been prepared before.

    One of the ranks that share the cache prepares while the others wait for the result. No process group is needed, so
    that no collective's timeout limits the wait. The result is the same on every rank unless a source changes
    meanwhile, see `agree_on`. A local file is hashed again only when its place, size or modification time differs.

    Raises:
        DataError: a source cannot be read, too many rows are unusable, or none is left to train on; see
            `common.data.errors` for the classes.
        NotWritable: the cache directory cannot be written to.
        UserError: a file of a source cannot be read.
    """
    return prepare_many([request], codec)


def prepare_many(requests: Sequence[DataRequest], codec: Codec) -> PreparedData:
    """The data of several requests of one kind, one after another. What one holds out, none trains on. Raises as
    `prepare`."""
    with checked_writing(requests[0].cache_dir):
        parts = [_from_cache(request, codec) for request in requests]
    data = parts[0] if len(parts) == 1 else _joined(parts)
    data.report.check(max(request.max_bad_fraction for request in requests))
    return data


def agree_on(*data: PreparedData) -> None:
    """Check that all ranks of the process group have prepared the same data.

    Raises:
        UserError: on every rank, if they have not.
    """
    keys = gather_objects([part.key for part in data])
    for rank, theirs in enumerate(keys):
        if theirs != keys[0]:
            raise UserError(
                f"rank {rank} has read other data than rank 0: a data source has changed meanwhile, or is "
                "not the same on each machine; start again when it no longer changes"
            )


def _from_cache(request: DataRequest, codec: Codec) -> PreparedData:
    cache = Path(request.cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{request.kind}-{data_key(request, codec)}"
    with locked(Path(f"{target}.lock"), "the data to be prepared") as writable:
        data = _load(target, announce=True)
        if data is None and not writable:
            raise NotWritable(
                cache,
                "cannot be written to, and what this run needs is not prepared there, or not complete: name a "
                "directory that can be written to",
            )
        if data is None:
            _build(request, codec, target)
            data = _load(target, announce=False)
    if data is None:
        raise DataError(target, "what has just been written there cannot be read: is the disk damaged?")
    return data


def _joined(parts: Sequence[PreparedData]) -> PreparedData:
    held_out = concatenate_datasets([part.eval for part in parts])
    train = concatenate_datasets([part.train for part in parts])
    test_prompt_hashes = np.concatenate([part.test_prompt_hashes for part in parts])
    train = _without(train, test_prompt_hashes)
    report = functools.reduce(PreparationReport.joined, (part.report for part in parts))
    return PreparedData(
        train,
        held_out,
        test_prompt_hashes,
        replace(report, train_rows=len(train)),
        " ".join(part.key for part in parts),
    )


def _without(train: Dataset, test_prompt_hashes: np.ndarray) -> Dataset:
    seen = np.isin(train.data.column("dialogue").to_numpy(), test_prompt_hashes)
    return train.select(np.flatnonzero(~seen)) if seen.any() else train


def _load(directory: Path, announce: bool) -> PreparedData | None:
    """The prepared data of a directory; None where there is none that can be used, with a line why if `announce`."""
    if not directory.is_dir():
        return None
    try:
        report = PreparationReport.from_json(unseal(directory))
        train, held_out = (Dataset.from_file(str(directory / f"{side}.arrow")) for side in ("train", "eval"))
        test_prompt_hashes = np.load(directory / _TEST_PROMPTS)
        if (len(train), len(held_out)) != (report.train_rows, report.eval_rows):
            raise Damaged("its rows are not those of its report")
    except OtherFormat as error:
        if announce:
            print(f"{directory}: {error}; it has to be prepared again", flush=True)
        return None
    except (Damaged, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if announce:
            print(f"{directory} is damaged: {error}; it has to be prepared again", flush=True)
        return None
    train = _without(train, test_prompt_hashes)
    return PreparedData(train, held_out, test_prompt_hashes, replace(report, train_rows=len(train)), directory.name)


def _build(request: DataRequest, codec: Codec, target: Path) -> None:
    """Prepare into a draft directory and rename it to `target`, so that a directory of that name is complete."""
    for left_over in (target, *target.parent.glob(f"{target.name}.tmp*")):
        shutil.rmtree(left_over, ignore_errors=True)
    directory = target.with_name(f"{target.name}.tmp{secrets.token_hex(4)}")
    directory.mkdir()  # not by tempfile, whose directories colleagues may not read
    try:
        report = PreparationReport()
        test_prompt_hashes: set[int] = set()
        held_out_keys: set[int] = set()
        keeps, margins = request.keep is not None, request.margin_column is not None
        encode = Encoder(request.kind, request.max_tokens, codec, keeps, margins)
        write = functools.partial(ArrowWriter, features=features(request.kind, keeps, margins))
        with write(path=str(directory / "train.arrow")) as train, write(path=str(directory / "eval.arrow")) as held_out:
            for *sides, outcome in in_order(encode, chunks(_taken(request, report, test_prompt_hashes, held_out_keys))):
                for writer, rows in zip((train, held_out), sides):
                    if len(rows):
                        writer.write_table(rows)
                report.add(outcome)
            report.train_rows, _ = train.finalize()
            report.eval_rows, _ = held_out.finalize()
        np.save(directory / _TEST_PROMPTS, np.fromiter(test_prompt_hashes | held_out_keys, np.int64))
        seal(directory, report.to_json())
        directory.rename(target)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _taken(
    request: DataRequest, report: PreparationReport, test_prompt_hashes: set[int], held_out_keys: set[int]
) -> Iterator[tuple[bool, SourcedRecord]]:
    """(whether it is for evaluation, record) for each record of this step. Fills the two sets of hashes."""
    records = read_records(
        request.data_path,
        request.kind,
        columns=request.columns,
        max_rows=request.max_rows,
        pairs_per_prompt=request.pairs_per_prompt,
        report=report.read,
        test_prompt_hashes=test_prompt_hashes,
        split_by=request.split_by,
        shared=request.shared,
        keep=request.keep,
        margin_column=request.margin_column,
    )
    by_turns = parse_split_by(request.split_by) is None
    prompts_seen: set[tuple[int, int]] = set()
    for sourced in records:
        place = assignment(sourced.split_key, request.data_split, request.eval_fraction)
        if not place.is_eval and request.phase not in (None, place.phase):
            # Also test data: another step may train on the same prompt, from a source without test data.
            report.other_phases += 1
            continue
        is_eval = place.is_eval or sourced.split == "test"
        if is_eval and sourced.copy:
            continue
        if isinstance(sourced.record, Prompt):
            # Several comparisons may share a prompt, but a rollout answers each prompt once. With other columns beside
            # it, its responses are judged otherwise.
            prompt = _hash(repr(sourced.record) + sourced.kept), sourced.copy
            if prompt in prompts_seen:
                report.repeated_prompts += 1
                continue
            prompts_seen.add(prompt)
        if is_eval:  # under every rule: another source may key the same dialogue by fewer turns or by more
            held_out_keys.update(all_keys(user_turns(sourced.record)) if by_turns else [sourced.dialogue])
        yield is_eval, sourced
    parts = sum(share > 0 for share in parse_data_split(request.data_split)) if request.phase is not None else 1
    if parts == 1 and not request.eval_fraction:
        report.read.inseparable.clear()  # nothing is split, so it does not matter


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
