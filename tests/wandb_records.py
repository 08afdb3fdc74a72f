"""What W&B has recorded offline, read back from its own files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_BLOCK, _HEADER = 32768, 7  # a file is blocks of records, as in LevelDB's log: crc (4), length (2), type (1), content


@dataclass
class Recorded:
    """One directory offline-run-*.

    Attributes:
        rows: what was logged, in order.
        numbers: W&B's own number of each row.
        axis: the metric of the horizontal axis, by pattern.
        tables: the content of the tables that the rows name, in their order.
        preempting: whether it said that it would go on.
        exit_code: None if it was not ended.
    """

    id: str = ""
    name: str = ""
    config: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    axis: dict[str, str] = field(default_factory=dict)
    tables: list[dict] = field(default_factory=list)
    preempting: bool = False
    exit_code: int | None = None


def recorded(output: Path) -> list[Recorded]:
    """The W&B runs in an output directory, by the time of their start; W&B's process is given time to write them."""
    directories = sorted((output / "logs" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    deadline = time.monotonic() + 10
    while True:
        runs = [_read(file) for directory in directories for file in directory.glob("run-*.wandb")]
        if all(run.exit_code is not None for run in runs) or time.monotonic() > deadline:
            return runs
        time.sleep(0.05)


def _read(file: Path) -> Recorded:
    from wandb.proto.wandb_internal_pb2 import Record

    found = Recorded()
    for content in _records(file.read_bytes()):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.id, found.name = record.run.run_id, record.run.display_name
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            found.numbers.append(values["_step"])
            row = {name: value for name, value in values.items() if not name.startswith(("_", "samples/"))}
            if path := values.get("samples/path"):
                found.tables.append({"step": row["step"], **json.loads((file.parent / "files" / path).read_text())})
                row["samples"] = path
            found.rows.append(row)
        elif kind == "metric" and record.metric.step_metric:
            found.axis[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "preempting":
            found.preempting = True
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _records(content: bytes) -> Iterator[bytes]:
    at, begun = _HEADER, b""  # the file begins with a header of its own, of the same length
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:  # the rest of a block is too small for a record
            at += _BLOCK - at % _BLOCK
            continue
        length, part = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        begun += content[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if part in (1, 4):  # whole, or the last part
            yield begun
            begun = b""


def metrics_of(sessions: list[Recorded]) -> list[dict]:
    """The rows of metrics of a run and its continuations, in the form of `tests.logs.metrics`."""
    rows = []
    for row in (row for session in sessions for row in session.rows if "samples" not in row):
        values = {name: value for name, value in row.items() if "second" not in name and name != "step"}
        rows.append(
            {"phase": next(iter(row.keys() - {"step"})).partition("/")[0], "step": row["step"]}
            | {name.partition("/")[2]: value for name, value in values.items()}
        )
    return rows
