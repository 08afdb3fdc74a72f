"""Writes metrics as JSON lines, to TensorBoard and W&B, samples, and a progress bar; sends libraries' logs to a file.

Rank 0 writes. On every other rank these functions do nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.artifacts.lock import lock_output
from common.runtime.distributed import is_main, rank, say
from common.runtime.signals import STOPPED, Stopped

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from common.artifacts.wandb_run import WandbRun


class Tracker:
    """Metrics and samples of one run, under its output directory; nothing is written before `begin`.

    A full or failing disk does not end the run. Metrics are kept until they can be written; events and samples are
    left out; a warning is printed once per file. A metrics file that is deleted or moved during the run is made again
    with all its lines. If the output directory itself is gone, nothing more is written: see `lost`.

    It is a context manager, which closes it as the run ends: well, stopped, or with an error.

    Files:
        logs/metrics.jsonl: one object per `log` call: step, phase, seconds since the start, and the metrics.
        logs/tensorboard/ (or `tensorboard_path`): the same as scalars named phase/metric.
        samples/NAME.jsonl: the rows given to `samples`.

    Args:
        output_dir: the run's output directory.
        tensorboard: whether to write TensorBoard events.
        tensorboard_path: directory of the events, if not in the logs directory.
        wandb: gets metrics and samples too.
    """

    def __init__(
        self,
        output_dir: str | Path,
        tensorboard: bool = True,
        tensorboard_path: str | None = None,
        wandb: WandbRun | None = None,
    ):
        self.directory = Path(output_dir)
        self._start = time.monotonic()
        self._file: FileIO | None = None
        self._board: SummaryWriter | None = None
        self._evaluation: tuple[int, int] | None = (
            None  # the step of the last evaluation, and the size of the metrics file before it
        )
        self._waiting = b""  # lines that could not be written yet
        self._refused: set[Path] = set()  # files that a warning was printed for
        self._metrics = self.directory / "logs" / "metrics.jsonl"
        self._events = Path(tensorboard_path or self.directory / "logs" / "tensorboard") if tensorboard else None
        self._wandb = wandb

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(0 if error is None else STOPPED if isinstance(error, Stopped) else 1)

    def begin(self, place: Mapping | None = None) -> None:
        """Open the files: empty, or, for a resumed run, truncated to where the checkpoint was taken.

        Args:
            place: the value of the method `place` in the checkpoint.
        """
        if not is_main():
            return
        logs = self._metrics.parent
        logs.mkdir(parents=True, exist_ok=True)
        if place is None:
            for old in (self.directory / "samples", logs / "tensorboard"):
                shutil.rmtree(old, ignore_errors=True)
        self._file = open(self._metrics, "ab+", buffering=0)
        end = int(min(place["bytes"], self._size())) if place else 0
        if self._wandb is not None:
            self._wandb.begin(end if place else None, self._metrics.read_bytes())
        self._file.truncate(end)
        if place is not None:
            self._start = time.monotonic() - place["seconds"]
        self._open_board(place["step"] + 1 if place else None)

    def lost(self) -> str | None:
        """What to say of the output directory if it was moved or deleted during the run, else None; None on other
        ranks."""
        if self._file is None:
            return None
        try:
            os.stat(self.directory)
            return None
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # unknown: a network file system may answer the next time
            return None
        new_path = ""
        with contextlib.suppress(OSError):  # Linux knows the current path of an open file
            new_path = os.readlink(f"/proc/self/fd/{self._file.fileno()}").removesuffix("/logs/metrics.jsonl")
        if not (Path(new_path) / "checkpoints").is_dir():
            new_path = ""
        what, cure = (
            (f"been moved to {new_path}", "move it back") if new_path else ("gone", "put them back, if you can")
        )
        return (
            f"{self.directory} has {what} under the run, whose checkpoints were in "
            f"{self.directory / 'checkpoints'}: {cure}, and the same command goes on from the newest"
        )

    def place(self, step: int) -> dict[str, float]:
        """The state of the files after `step`, for `begin`. An evaluation after that step is left out, because a
        resumed run repeats it."""
        size = self._settled_size() if self._file is not None else 0
        if self._evaluation is not None and self._evaluation[0] == step:
            size = self._evaluation[1]
        return {"step": step, "bytes": size, "seconds": time.monotonic() - self._start}

    def log(self, phase: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record metrics of a phase ("train", "eval", "done", ...) at a step.

        None is left out; a number that JSON cannot hold (NaN, infinity) is written as null.
        """
        if self._file is None:
            return
        if phase == "eval":
            self._evaluation = step, self._settled_size()
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items() if value is not None}
        record = {"phase": phase, "step": step, "seconds": round(time.monotonic() - self._start, 3), **values}
        self._waiting += f"{json.dumps(record)}\n".encode()
        with self._tolerant(self._metrics):
            self._write_waiting()
        if self._board is not None and self._events is not None:
            with self._tolerant(self._events):
                for name, value in values.items():
                    if value is not None:
                        self._board.add_scalar(f"{phase}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(record)

    @property
    def _open_file(self) -> FileIO:
        assert self._file is not None, "nothing is written before begin()"
        return self._file

    def _size(self) -> int:
        return os.fstat(self._open_file.fileno()).st_size

    def _settled_size(self) -> int:
        """The size of the metrics file in bytes, after another attempt to write the waiting lines."""
        with self._tolerant(self._metrics):
            self._write_waiting()
        return self._size()

    def samples(self, name: str, rows: Iterable[Mapping]) -> None:
        """Write rows (prompts, responses, scores) to samples/NAME.jsonl."""
        if self._file is None:
            return
        path, rows = self.directory / "samples" / f"{name}.jsonl", list(rows)
        if self._wandb is not None:
            self._wandb.table(rows)
        with self._tolerant(path):
            path.parent.mkdir(exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def progress(self, total: int, what: str, done: int = 0) -> Any:
        """A tqdm bar with `done` of `total` filled; on ranks other than 0 it shows nothing."""
        from tqdm import tqdm

        return tqdm(total=total, initial=done, desc=what, disable=not is_main(), mininterval=1.0, dynamic_ncols=True)

    def close(self, exit_code: int = 0) -> None:
        """Flush and close the files, and end the W&B run. A second call does nothing.

        Args:
            exit_code: of the program, which W&B shows.
        """
        if self._file is None:
            return
        size = self._settled_size()
        with self._tolerant(self._metrics):
            self._file.close()
        self._file = None
        if self._board is not None and self._events is not None:
            with self._tolerant(self._events):
                self._board.close()
        if self._wandb is not None:
            self._wandb.close(exit_code, size)

    def _open_board(self, purge_step: int | None = None) -> None:
        if self._events is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        with self._tolerant(self._events):
            self._board = SummaryWriter(str(self._events), purge_step=purge_step)

    def _write_waiting(self) -> None:
        if not self._is_in_place():
            self._restore_file()
        while self._waiting:
            self._waiting = self._waiting[self._open_file.write(self._waiting) :]

    def _is_in_place(self) -> bool:
        """Whether the metrics file's path still names the open file."""
        try:
            return os.path.samestat(os.stat(self._metrics), os.fstat(self._open_file.fileno()))
        except FileNotFoundError:
            return False

    def _restore_file(self) -> None:
        """Open a new metrics file with the lines of the old one, which can still be read although it has no path."""
        with contextlib.suppress(FileExistsError):
            self._metrics.parent.mkdir()  # the output directory itself is not made again
        lock_output(self.directory)  # the lock file may have been deleted too
        new, old = open(self._metrics, "ab+", buffering=0), self._open_file
        old.seek(0)
        new.truncate(0)
        self._waiting = old.read() + self._waiting
        old.close()
        self._file = new
        say(f"warning: {self._metrics} was deleted or replaced under the run: it is made again")
        if self._events is not None and not self._events.is_dir():
            self._open_board()

    @contextlib.contextmanager
    def _tolerant(self, path: Path) -> Iterator[None]:
        """Within the context, an OSError becomes a warning about `path`, printed once."""
        try:
            yield
        except OSError as error:
            if path not in self._refused:
                say(f"warning: {path} cannot be written: {error.strerror or error}")
            self._refused.add(path)


def quiet_libraries(output_dir: str | Path) -> None:
    """Send the logs of DeepSpeed and transformers, and Python's warnings, to logs/libraries.rankN.log.

    The terminal then shows the lines of the programs only.
    """
    logs = Path(output_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(logs / f"libraries.rank{rank()}.log", encoding="utf-8")
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk must not end the run
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)

    from deepspeed.utils import logger as deepspeed_logger

    for logger in (
        deepspeed_logger,
        logging.getLogger("transformers"),
        logging.getLogger("py.warnings"),
        logging.getLogger("datasets"),
        logging.getLogger("peft"),
        logging.getLogger("torch"),
    ):
        logger.handlers[:] = [handler]
        logger.propagate = False

    usual = threading.excepthook

    def quiet(args: threading.ExceptHookArgs) -> None:
        """Ignore errors of TensorBoard's writer thread: the next event raises them again, where they are handled."""
        if not type(args.thread).__module__.startswith("tensorboard"):
            usual(args)

    threading.excepthook = quiet
