"""What a run says: metrics as JSON lines and TensorBoard, samples, a progress bar; libraries' chatter to a file.

Rank 0 writes; on every other rank all of it does nothing.
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
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.artifacts.lock import lock_output
from common.runtime.distributed import is_main, rank, say


class Tracker:
    """Metrics and samples of one run, under its output directory; nothing is written before `begin`.

    A disk that refuses ends no run: metrics wait until it takes them, the rest is left out, and that is said once. A
    metrics file that is deleted or moved is made again, with all that it held. Where the output directory itself has
    gone nothing is written any more, see `lost`.

    Files:
        logs/metrics.jsonl: one object per `log` call: step, phase, seconds since the start, and the metrics.
        logs/tensorboard/ (or `tensorboard_path`): the same as scalars named phase/metric.
        samples/NAME.jsonl: what `samples` was given.

    Args:
        output_dir: the run's output directory.
        tensorboard: whether to write TensorBoard events.
        tensorboard_path: where, if not in the logs directory.
    """

    def __init__(self, output_dir: str | Path, tensorboard: bool = True, tensorboard_path: str | None = None):
        self.directory = Path(output_dir)
        self._start = time.monotonic()
        self._file = self._board = None
        self._evaluation: tuple[int, int] | None = None  # the step of the last one, and the size of the file before it
        self._waiting = b""  # lines that the disk has not taken yet
        self._refused: set[Path] = set()
        self._metrics = self.directory / "logs" / "metrics.jsonl"
        self._events = Path(tensorboard_path or self.directory / "logs" / "tensorboard") if tensorboard else None

    def begin(self, place: Mapping | None = None) -> None:
        """Open the files: empty ones, or those of a run that is resumed, cut off where its checkpoint was taken.

        Args:
            place: what `place` returned at the checkpoint.
        """
        if not is_main():
            return
        logs = self._metrics.parent
        logs.mkdir(parents=True, exist_ok=True)
        if place is None:
            for old in (self.directory / "samples", logs / "tensorboard"):
                shutil.rmtree(old, ignore_errors=True)
        self._file = open(self._metrics, "ab+", buffering=0)
        self._file.truncate(min(place["bytes"], self._size()) if place else 0)
        if place is not None:
            self._start = time.monotonic() - place["seconds"]
        self._open_board(place["step"] + 1 if place else None)

    def lost(self) -> str | None:
        """What to say where the output directory has gone under the run; None on other ranks than 0."""
        if self._file is None:
            return None
        try:
            os.stat(self.directory)
            return None
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError:  # not known; a network's file system may answer the next time
            return None
        now = ""
        with contextlib.suppress(OSError):  # Linux follows what is open
            now = os.readlink(f"/proc/self/fd/{self._file.fileno()}").removesuffix("/logs/metrics.jsonl")
        where = now if (Path(now) / "checkpoints").is_dir() else ""
        what, cure = (f"been moved to {where}", "move it back") if where else ("gone", "put them back, if you can")
        return (
            f"--output_dir {self.directory} has {what} under the run, whose checkpoints were in "
            f"{self.directory / 'checkpoints'}: {cure}, and the same command goes on from the newest"
        )

    def place(self, step: int) -> dict[str, float]:
        """Where the files are after `step`, for `begin`: before the evaluation that follows it, which is made again."""
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
        if self._board is not None:
            with self._tolerant(self._events):
                for name, value in values.items():
                    if value is not None:
                        self._board.add_scalar(f"{phase}/{name}", value, step)

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _settled_size(self) -> int:
        """Bytes of the metrics file, with the lines that have waited, if there is room for them now."""
        with self._tolerant(self._metrics):
            self._write_waiting()
        return self._size()

    def samples(self, name: str, rows: Iterable[Mapping]) -> None:
        """Write rows (prompts, answers, scores) to samples/NAME.jsonl."""
        if self._file is None:
            return
        path = self.directory / "samples" / f"{name}.jsonl"
        with self._tolerant(path):
            path.parent.mkdir(exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def progress(self, total: int, what: str, done: int = 0):
        """A tqdm bar on rank 0, `done` of `total` filled; elsewhere one that shows nothing."""
        from tqdm import tqdm

        return tqdm(total=total, initial=done, desc=what, disable=not is_main(), mininterval=1.0, dynamic_ncols=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self._file is not None:
            with self._tolerant(self._metrics):
                self._write_waiting()
                self._file.close()
        if self._board is not None:
            with self._tolerant(self._events):
                self._board.close()

    def _open_board(self, purge_step: int | None = None) -> None:
        if self._events is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        with self._tolerant(self._events):
            self._board = SummaryWriter(str(self._events), purge_step=purge_step)

    def _write_waiting(self) -> None:
        if not self._is_there():
            self._make_again()
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._metrics), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def _make_again(self) -> None:
        """Open a new metrics file with what the old one held, which can still be read though it has no name."""
        with contextlib.suppress(FileExistsError):
            self._metrics.parent.mkdir()  # not the output directory
        lock_output(self.directory)  # its file may have gone with this one
        new = open(self._metrics, "ab+", buffering=0)
        self._file.seek(0)
        new.truncate(0)
        self._waiting = self._file.read() + self._waiting
        self._file.close()
        self._file = new
        say(f"warning: {self._metrics} was deleted or replaced under the run: it is made again")
        if self._events is not None and not self._events.is_dir():
            self._open_board()

    @contextlib.contextmanager
    def _tolerant(self, path: Path):
        try:
            yield
        except OSError as error:
            if path not in self._refused:
                say(f"warning: {path} cannot be written: {error.strerror or error}")
            self._refused.add(path)


def quiet_libraries(output_dir: str | Path) -> None:
    """Send what DeepSpeed, transformers and Python's warnings say to logs/libraries.rankN.log.

    Our own lines then stand alone on the terminal.
    """
    logs = Path(output_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(logs / f"libraries.rank{rank()}.log", encoding="utf-8")
    handler.handleError = lambda record: None  # a full disk ends no run, nor does it fill the terminal
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

    def quiet(death) -> None:
        """What ends TensorBoard's writer is raised again where the next event is written, and told from there."""
        if not type(death.thread).__module__.startswith("tensorboard"):
            usual(death)

    threading.excepthook = quiet
