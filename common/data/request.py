"""Defines what a step asks to be prepared, and the key of the prepared data."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import transformers

from common.data.blend import SourceSpec
from common.data.file_lock import locked
from common.data.keeping import KeptColumns
from common.data.prepared_files import FORMAT
from common.data.reading import fingerprint
from common.data.tokenization import Codec, tokenizer_fingerprint

_SETTLED = 2  # seconds after which a further change of a file shows in its modification time


@dataclass(frozen=True)
class DataRequest:
    """What a step wants prepared.

    Attributes:
        data_path: the blend, see `common.data.blend.parse_data_path`.
        kind: "demonstration", "comparison", "feedback", "prompt" or "text".
        phase: 0, 1 or 2 takes this phase's share of the prompts, to train on or, of the sources' own test data, to
            evaluate on; None takes all of them.
        max_tokens: limit of a whole sequence, prompt and response with its end token; of plain text, the length of
            the pieces that it is cut into.
        cache_dir: directory of the prepared data.
        data_split, eval_fraction: see `common.data.split.assignment`. Held-out prompts are held out of every
            phase, so each phase evaluates on all of them.
        split_by, shared: what keeps dialogues together in a split, see `common.data.reading.read_records`.
        columns, max_rows, pairs_per_prompt: see `common.data.reading.read_records`.
        margin_column: the column that holds the margins of comparisons, see `common.data.reading.read_records`.
        max_bad_fraction: more unusable rows than this share of a source's rows are an error.
        keep: of prompts, the columns that are kept beside the ids, with the dialogue itself; None: nothing.
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
    margin_column: str | None = None
    max_bad_fraction: float = 0.02
    keep: KeptColumns | None = None


def data_key(request: DataRequest, codec: Codec) -> str:
    """A hash (32 hex digits) of all that decides the rows: `FORMAT`, the names of the sources as --data_path has them,
    their content, the options, the tokenizer, the template, and the exact versions of transformers and tokenizers.

    Checkpoints record it, and a run resumes only over data of the same key. So nothing else may change it, such as the
    source text of this package. A name may be a path: the same file under another path is another source.
    """
    decisive = {
        "format": FORMAT,
        "sources": [[spec.name, _source_hash(spec, request)] for spec in request.data_path],
        "kind": request.kind,
        "phase": request.phase,
        "max_tokens": request.max_tokens,
        "data_split": request.data_split,
        "eval_fraction": request.eval_fraction,
        "split_by": request.split_by,
        "shared": {source: sorted(turns) for source, turns in (request.shared or {}).items()},
        "columns": dict(request.columns or {}),
        "max_rows": request.max_rows,
        "pairs_per_prompt": request.pairs_per_prompt,
        "codec": [tokenizer_fingerprint(codec.tokenizer), codec.template.name, codec.date, codec.end_token],
        "libraries": [transformers.__version__, tokenizers.__version__],
    }
    if codec.two_sided:
        decisive["two_sided"] = True
    if request.keep is not None:
        decisive["keep"] = request.keep.decisive()
    if request.margin_column is not None:  # only then, so that the keys of other data stay as they were
        decisive["margin_column"] = request.margin_column
    return _hash_of(decisive)


def _source_hash(spec: SourceSpec, request: DataRequest) -> str:
    """`reading.fingerprint`, which reads all bytes of the source.

    For local files the result is noted in the cache directory, and reused while no file's size or modification time
    changes. Of streamed files only the edges are read.
    """
    path, cache_dir = Path(spec.name), Path(request.cache_dir)
    if not path.exists() or spec.streamed:
        return fingerprint(spec, request.columns, request.max_rows)
    with locked(cache_dir / "sources.lock", f"{spec.name} to be hashed") as writable:
        files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
        stats = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        columns = dict(request.columns or {})
        state = [FORMAT, stats, spec.name, spec.weight, vars(spec.form), columns, request.max_rows]
        note = cache_dir / f"source-{_hash_of(state)}.sha256"
        if note.is_file() and len(noted := note.read_text().strip()) == 64:
            return noted
        source_fingerprint = fingerprint(spec, request.columns, request.max_rows)
        if writable and max((time_ns for *_, time_ns in stats), default=0) < time.time_ns() - _SETTLED * 10**9:
            note.write_text(f"{source_fingerprint}\n")
        return source_fingerprint


def _hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
