"""Records a run in Weights & Biases: its metrics, tables of its samples, and its options without secrets.

W&B's own settings hold: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and so on, or its settings files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_SILENT", "true")  # the terminal shows the lines of the programs

import wandb
from pydantic import ValidationError

from common.config.parser import Config, options
from common.errors import InputError
from common.runtime.distributed import say
from common.runtime.signals import STOPPED

FILE = "wandb.json"  # in the logs directory: which W&B run is that of the output directory
# Seconds that the end of a run waits for W&B, unless WANDB_FINISH_TIMEOUT says otherwise; less than `watchdog.GRACE`.
_LONGEST_UPLOAD = 20.0
_IDLE_TIMEOUT = "30s"  # after which W&B's process ends
_ADDRESS = re.compile(r"(\w+://)(?:[^/?#\s]*@)?([^/?#:\s]*)\S*")  # scheme, host; user, port, path and query go


def check_usable() -> None:
    """Raise InputError if W&B knows no key for online mode, or one of its settings is wrong. It asks no question."""
    start_service()
    try:
        online = wandb.setup().settings.mode in ("online", "run")
        ready = not online or wandb.login(prompt=False, verify=False)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError("wandb", f"its setting {'.'.join(map(str, first['loc']))} is wrong: {first['msg']}") from None
    except wandb.Error as error:
        raise InputError("wandb", _line(error)) from None
    if not ready:
        raise InputError(
            "wandb",
            "it has no API key: run `wandb login`, or set WANDB_API_KEY, or record on this machine only with "
            "WANDB_MODE=offline",
        )


def start_service() -> None:
    """Start W&B's own process, which keeps and sends what is logged, where the launcher of a run does not find it.

    Below a rank it would be ended with the rank, at once, and what it has not written yet would be lost. It ends by
    itself, some time after the last run. If it cannot be started, W&B starts one below the rank.
    """
    if "WANDB_SERVICE" in os.environ:
        return
    command = [sys.executable, "-P", "-m", "wandb", "beta", "core", "start", "--idle-timeout", _IDLE_TIMEOUT]
    with contextlib.suppress(subprocess.SubprocessError):
        started = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60, check=True
        )
        os.environ["WANDB_SERVICE"] = started.stdout.strip()


def without_secrets(config: Config) -> dict[str, Any]:
    """The resolved options, for a reader elsewhere: of an address only its scheme and its host, because a key may stand
    in any other part of it. Contents of files and of environment variables are not among them."""
    values = {name: getattr(config, name) for name, meta in options(type(config)).items() if not meta.ignored}
    return {name: _without_addresses(value) for name, value in values.items()}


class WandbRun:
    """The W&B run of an output directory. A resumed run continues it, under the same id.

    Nothing that goes wrong in it ends the run: the first failure is a warning, and the metrics file has every row.

    W&B only ever appends, and numbers its rows upwards. The horizontal axis of its charts is therefore `step`, and not
    this number, so that an evaluation that follows a resume at the same step is not refused. A row that was sent before
    the interruption and is computed again, equal but for its times, is not sent again. After a run that was killed it
    is, because W&B may have lost it.

    Files:
        logs/wandb.json: the id, how many rows W&B has at most, how much of the metrics file it has for certain, and
            the rows that it has beyond that file: they were removed by a resume and not computed again yet.
        logs/wandb/ (or in WANDB_DIR): W&B's own.

    Args:
        logs: the logs directory of the output directory.
        name: of the run; None: WANDB_NAME, else the name of the output directory.
        config: what W&B shows as the run's configuration, see `without_secrets`.
    """

    def __init__(self, logs: Path, name: str | None, config: Mapping[str, Any]):
        self._logs, self._config = logs, dict(config)
        self._name = name or os.environ.get("WANDB_NAME") or logs.absolute().parent.name
        self._run: wandb.Run | None = None
        self._failed = False
        self._sent: list[dict[str, Any]] = []  # rows of the interrupted run that may come again
        self._rows = 0  # sent so far
        self._step, self._repeated = 0, False  # of the row last given to `log`

    def begin(self, place: int | None, metrics: bytes) -> None:
        """Open the run.

        Args:
            place: where the rows of the checkpoint end in the metrics file; None: the run starts anew.
            metrics: the content of that file before anything is removed from it.
        """
        with self._tolerant():
            before = None if place is None else self._recorded()
            if before is not None:
                again = metrics[place : before["bytes"]].splitlines()
                self._sent = before["removed"] + [_without_times(json.loads(line)) for line in again]
                # Of a killed run it is not known; a row of the file is one of metrics, and perhaps one with samples.
                self._rows = before["rows"] + (0 if before["bytes"] else 2 * metrics.count(b"\n"))
            run = wandb.init(
                dir=os.environ.get("WANDB_DIR") or str(self._logs),
                name=self._name,
                id=before["id"] if before else None,
                resume="allow" if before else None,
                config=self._config,
                settings=_settings(),
            )
            if run.disabled:
                return
            run.define_metric("*", step_metric="step")
            self._run = run
            self._record(0)
            say(
                f"Weights & Biases, offline: to upload it, wandb sync {run.settings.sync_dir}"
                if run.offline
                else f"Weights & Biases: {run.url}"
            )

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row of the metrics file as PHASE/METRIC."""
        lasting = _without_times(row)
        self._step, self._repeated = row["step"], lasting in self._sent
        if self._repeated:
            self._sent.remove(lasting)
        metrics = {name: value for name, value in row.items() if name not in ("phase", "step", "seconds")}
        self._send({f"{row['phase']}/{name}": value for name, value in metrics.items() if value is not None})

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send samples as a table, at the step of the last row of metrics."""
        if self._run is None or not rows:
            return
        columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
        data = [[_cell(row.get(str(name))) for name in columns] for row in rows]
        with self._tolerant():
            self._send({"samples": wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def close(self, exit_code: int, size: int) -> None:
        """End the run; W&B shows it as finished, failed or preempted, by the exit code of the program.

        Args:
            size: of the metrics file, in bytes.
        """
        if self._run is None:
            return
        with self._tolerant():
            if exit_code == STOPPED:
                self._run.mark_preempting()
            self._run.finish(exit_code=exit_code)
            if not self._failed:
                self._record(size)
        self._run = None

    def _send(self, values: dict[str, Any]) -> None:
        if self._run is not None and not self._repeated:
            with self._tolerant():
                self._run.log({"step": self._step, **values}, step=self._rows, commit=True)
                self._rows += 1

    def _recorded(self) -> dict[str, Any] | None:
        """What `_record` wrote, if anything."""
        try:
            values = json.loads((self._logs / FILE).read_text(encoding="utf-8"))
            return {
                "id": str(values["id"]),
                "rows": int(values["rows"]),
                "bytes": int(values["bytes"]),
                "removed": list(values.get("removed", [])),
            }
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _record(self, size: int) -> None:
        """Write what `_recorded` reads.

        Args:
            size: up to where W&B has the metrics file for certain; 0 while the run goes on.
        """
        assert self._run is not None
        values = {"id": self._run.id, "rows": self._rows, "bytes": size, "removed": self._sent if size else []}
        (self._logs / FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Within the context, any error becomes a warning, which is printed once."""
        try:
            yield
        except Exception as error:  # of a library that is not worth a run
            if not self._failed:
                say(f"warning: Weights & Biases: {_line(error)}: the run goes on; {self._logs}/metrics.jsonl has all")
            self._failed = True


def _settings() -> wandb.Settings:
    """Without what may hold secrets: the command line, the address of the git repository, packages' addresses, code,
    and what is printed."""
    settings = wandb.Settings(
        x_disable_meta=True,
        disable_git=True,
        x_save_requirements=False,
        save_code=False,
        console="off",
        finish_timeout_raises=True,
    )
    if "WANDB_FINISH_TIMEOUT" not in os.environ:
        settings.finish_timeout = _LONGEST_UPLOAD
    return settings


def _without_addresses(value: Any) -> Any:
    if isinstance(value, str):
        return _ADDRESS.sub(r"\1\2/...", value)
    if isinstance(value, tuple | list):
        return [_without_addresses(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_addresses(item) for name, item in value.items()}
    return value


def _without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "second" not in name}


def _cell(value: Any) -> Any:
    """A value that a table can hold."""
    plain = value is None or isinstance(value, str | int | float)
    return value if plain else json.dumps(value, ensure_ascii=False)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
