"""Records to ids, once: written to Arrow files that every later start, and every rank, only maps into
memory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from datasets import Dataset, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock, Timeout

from common.data.blend import SourceSpec
from common.data.encoding import Encoder, chunks, features
from common.data.openings import all_keys
from common.data.parallel import in_order
from common.data.preparation_report import PreparationReport
from common.data.prepared_files import Damaged, seal, unseal
from common.data.reading import SourcedRecord, fingerprint, read_records
from common.data.records import Prompt, user_turns
from common.data.split import assignment, parse_data_split, parse_split_by
from common.data.tokenization import Codec, tokenizer_fingerprint
from common.errors import UserError
from common.paths import writing_to
from common.runtime.distributed import gather_objects

_TESTED = "tested.npy"
_PATIENCE = 10  # seconds until a rank says what it waits for
_SETTLED = 2  # seconds after which a further change of a file shows in its time


@dataclass(frozen=True)
class DataRequest:
    """What a step wants prepared.

    Attributes:
        data_path: the blend, see `common.data.blend.parse_data_path`.
        kind: "demonstration", "comparison", "prompt" or "text".
        phase: 0, 1 or 2 takes this phase's share of the prompts, to train on or, of the sources' own test data, to
            evaluate on; None takes all of them.
        data_split, eval_fraction: see `common.data.split.assignment`. Held-out prompts are held out of every
            phase, so each phase evaluates on all of them.
        split_by, shared: by what dialogues are told apart, see `common.data.reading.read_records`.
        columns, max_rows, pairs_per_prompt: see `common.data.reading.read_records`.
        max_tokens: of a whole sequence, prompt and response with its end token; of a piece of plain text.
        max_bad_fraction: more unusable rows than this share of a source's are an error.
        cache_dir: directory of the prepared data.
        length_flag: the option that `max_tokens` comes from, for messages.
    """

    data_path: Sequence[SourceSpec]
    kind: str
    phase: int | None
    max_tokens: int
    cache_dir: str | Path
    data_split: str = "2,4,4"
    eval_fraction: float = 0.05
    split_by: str = "auto"
    shared: Mapping[str, Collection[int]] | None = None
    columns: Mapping[str, str] | None = None
    max_rows: int | None = None
    pairs_per_prompt: int | None = None
    max_bad_fraction: float = 0.02
    length_flag: str = "--max_seq_len"


@dataclass(frozen=True)
class PreparedData:
    """Memory-mapped rows of ids.

    Columns, by kind: `prompt_ids` and `response_ids` | `prompt_ids`, `chosen_ids` and `rejected_ids` |
    `prompt_ids` | `input_ids`. Always `length`, the tokens of the row's longest sequence, and `dialogue`, see
    `common.data.openings.Key`. `tested`: the dialogues that are not trained on, by any rule: all prompts of the
    sources' own test data, whatever became of their rows, and what is held out. `key`: a hash of all that decided the
    content.
    """

    train: Dataset
    eval: Dataset
    tested: np.ndarray
    report: PreparationReport
    key: str


def prepare(request: DataRequest, codec: Codec) -> PreparedData:
    """The data of a step, from the cache where they have been prepared before.

    One of the ranks that share the cache prepares while the others wait for the result; no process group is
    needed, so a wait may last as long as it takes. The result is the same on every rank, unless a source
    changes meanwhile, see `agree_on`. A local file is hashed again only when its place, size or time of change differs.

    Raises:
        UserError: a source cannot be read, too many rows are unusable, or none is left to train on.
    """
    return prepare_many([request], codec)


def prepare_many(requests: Sequence[DataRequest], codec: Codec) -> PreparedData:
    """The data of several requests of one kind in a row. What one holds out, none trains on. Raises as
    `prepare`."""
    with writing_to("--data_output_path", requests[0].cache_dir):
        parts = [_from_cache(request, codec) for request in requests]
    data = parts[0] if len(parts) == 1 else _joined(parts)
    flags = dict.fromkeys(spec.flag for request in requests for spec in request.data_path)
    data.report.check(
        max(request.max_bad_fraction for request in requests),
        length_flag=requests[0].length_flag,
        data_flag=" and ".join(flags),
    )
    return data


def agree_on(*data: PreparedData) -> None:
    """Make sure that all ranks of the process group have prepared the same.

    Raises:
        UserError: on every rank alike, if they have not.
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
    target = cache / f"{request.kind}-{_key(request, codec)}"
    with _locked(Path(f"{target}.lock"), "the data to be prepared") as writable:
        data = _load(target, again=True)
        if data is None and not writable:
            raise UserError(
                f"--data_output_path {cache}: cannot be written to, and what this run needs is not "
                "prepared there, or not whole: name a directory that can be written to"
            )
        if data is None:
            _build(request, codec, target)
            data = _load(target, again=False)
    return data


@contextlib.contextmanager
def _locked(path: Path, awaited: str) -> Iterator[bool]:
    """Within it no other process is; False where nothing may be written, and so nothing can change either."""
    lock, writable = FileLock(path), True
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        print(f"local rank {os.environ.get('LOCAL_RANK', '0')}: waiting for {awaited}", flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        writable = False
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        if not writable and path.is_file():  # a colleague's, which may be waited for all the same
            with contextlib.suppress(OSError):
                stream = stack.enter_context(open(path, "rb"))
                fcntl.flock(stream, fcntl.LOCK_EX)
                writable = os.access(path.parent, os.W_OK)
        yield writable


def _joined(parts: Sequence[PreparedData]) -> PreparedData:
    held_out = concatenate_datasets([part.eval for part in parts])
    train = concatenate_datasets([part.train for part in parts])
    tested = np.concatenate([part.tested for part in parts])
    train = _without(train, tested)
    report = functools.reduce(PreparationReport.joined, (part.report for part in parts))
    return PreparedData(
        train, held_out, tested, replace(report, train_rows=len(train)), " ".join(part.key for part in parts)
    )


def _without(train: Dataset, tested: np.ndarray) -> Dataset:
    seen = np.isin(train.data.column("dialogue").to_numpy(), tested)
    return train.select(np.flatnonzero(~seen)) if seen.any() else train


def _key(request: DataRequest, codec: Codec) -> str:
    """A hash of all that decides the content of the prepared data, the code of this package included."""
    asked = {
        name: value
        for name, value in vars(request).items()
        if name not in ("cache_dir", "max_bad_fraction", "length_flag")
    }
    asked["data_path"] = [[spec.name, _fingerprint(spec, request)] for spec in request.data_path]
    asked["columns"] = dict(request.columns or {})
    asked["shared"] = {source: sorted(openings) for source, openings in (request.shared or {}).items()}
    asked["codec"] = [tokenizer_fingerprint(codec.tokenizer), codec.template.name, codec.date, codec.end_token]
    asked["code"] = _code()
    asked["libraries"] = [transformers.__version__, tokenizers.__version__]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def _code() -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(__file__).parent.glob("*.py"))]


def _fingerprint(spec: SourceSpec, request: DataRequest) -> str:
    """`reading.fingerprint`, which reads all of the source's bytes; of local files it is noted in the cache."""
    path = Path(spec.name)
    if not path.exists():
        return fingerprint(spec, request.columns, request.max_rows)
    with _locked(Path(request.cache_dir) / "sources.lock", f"{spec.name} to be hashed") as writable:
        files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
        stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        state = [stats, spec.name, spec.weight, vars(spec.form), dict(request.columns or {}), request.max_rows, _code()]
        name = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]
        note = Path(request.cache_dir) / f"source-{name}.sha256"
        if note.is_file() and len(noted := note.read_text().strip()) == 64:
            return noted
        found = fingerprint(spec, request.columns, request.max_rows)
        if writable and max((time_ns for *_, time_ns in stats), default=0) < time.time_ns() - _SETTLED * 10**9:
            note.write_text(f"{found}\n")
        return found


def _load(directory: Path, again: bool) -> PreparedData | None:
    """What lies prepared in a directory; None if that is not the whole of it, which is said if it is made ``again``."""
    if not directory.is_dir():
        return None
    try:
        report = PreparationReport.from_json(unseal(directory))
        train, held_out = (Dataset.from_file(str(directory / f"{side}.arrow")) for side in ("train", "eval"))
        tested = np.load(directory / _TESTED)
        if (len(train), len(held_out)) != (report.train_rows, report.eval_rows):
            raise Damaged("its rows are not those of its report")
    except (Damaged, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if again:
            print(f"{directory} is damaged: {error}; it has to be prepared again", flush=True)
        return None
    train = _without(train, tested)
    return PreparedData(train, held_out, tested, replace(report, train_rows=len(train)), directory.name)


def _build(request: DataRequest, codec: Codec, target: Path) -> None:
    """Prepare into a directory of its own and move that into place: what is there is whole."""
    for left_over in (target, *target.parent.glob(f"{target.name}.tmp*")):
        shutil.rmtree(left_over, ignore_errors=True)
    directory = target.with_name(f"{target.name}.tmp{secrets.token_hex(4)}")
    directory.mkdir()  # which colleagues may read, if the umask lets them: not so a temporary directory
    try:
        report, tested, held_out_keys = PreparationReport(), set(), set()
        encode = Encoder(request.kind, request.max_tokens, codec)
        write = functools.partial(ArrowWriter, features=features(request.kind))
        with write(path=str(directory / "train.arrow")) as train, write(path=str(directory / "eval.arrow")) as held_out:
            for *sides, outcome in in_order(encode, chunks(_taken(request, report, tested, held_out_keys))):
                for writer, rows in zip((train, held_out), sides):
                    if len(rows):
                        writer.write_table(rows)
                report.add(outcome)
            report.train_rows, _ = train.finalize()
            report.eval_rows, _ = held_out.finalize()
        np.save(directory / _TESTED, np.fromiter(tested | held_out_keys, np.int64))
        seal(directory, report.to_json())
        directory.rename(target)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _taken(
    request: DataRequest, report: PreparationReport, tested: set[int], held_out_keys: set[int]
) -> Iterator[tuple[bool, SourcedRecord]]:
    """(is for evaluation, record) for each record of this step."""
    records = read_records(
        request.data_path,
        request.kind,
        columns=request.columns,
        max_rows=request.max_rows,
        pairs_per_prompt=request.pairs_per_prompt,
        report=report.read,
        tested=tested,
        split_by=request.split_by,
        shared=request.shared,
    )
    by_turns = parse_split_by(request.split_by) is None
    prompts_seen: set[tuple[int, int]] = set()
    for sourced in records:
        place = assignment(sourced.key, request.data_split, request.eval_fraction)
        if not place.is_eval and request.phase not in (None, place.phase):
            # Test data too: another step may have a source, without such data, that trains it on the same prompt.
            report.other_phases += 1
            continue
        is_eval = place.is_eval or sourced.split == "test"
        if is_eval and sourced.copy:
            continue
        if isinstance(sourced.record, Prompt):
            # A set of comparisons may have several to a prompt; a rollout has no use for the same prompt twice.
            prompt = _hash(repr(sourced.record)), sourced.copy
            if prompt in prompts_seen:
                report.repeated_prompts += 1
                continue
            prompts_seen.add(prompt)
        if is_eval:  # by the rule of this source; another may key the same dialogue by fewer turns or by more
            held_out_keys.update(all_keys(user_turns(sourced.record)) if by_turns else [sourced.dialogue])
        yield is_eval, sourced
    parts = sum(share > 0 for share in parse_data_split(request.data_split)) if request.phase is not None else 1
    if parts == 1 and not request.eval_fraction:
        report.read.inseparable.clear()  # and no need to be


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
