"""Runs a reward function in processes of its own, several at a time and each call with a limit of time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any

from common.paths import ROOT
from common.rewards.answers import WrongAnswer
from common.rewards.batch import RewardBatch, Scores, merged
from common.rewards.function import Function, score_singly_if_wrong

_START_SECONDS = 60.0  # that a process may take to start and to import the function, beside the limit of a call


class PooledFunction:
    """A function that is called in worker processes. They start with the first call and end with this process.

    Args:
        function: the function; the workers load it anew by its name.
        workers: how many processes there are.
        timeout: seconds that each call may take. A worker that takes longer is killed, and another takes its place.
        every_failure: whether all responses that fail are wanted; else the first is enough.
    """

    def __init__(self, function: Function, workers: int, timeout: float, every_failure: bool = False):
        self.function, self.timeout, self.every_failure = function, timeout, every_failure
        self._workers: list[_Worker | None] = [None] * workers

    def score(self, batch: RewardBatch) -> Scores:
        """The scores of all responses, divided evenly between the workers."""
        parts = batch.parts(max(1, -(-len(batch) // len(self._workers))))
        batches = [batch.select(indices) for indices in parts]
        # All are at work before the first is waited for, and have answered before a response is tried alone.
        asked = [self._ask(at, part) for at, part in enumerate(batches)]
        answers = [answer() for answer in asked]
        scored = [self._checked(at, part, answer) for at, (part, answer) in enumerate(zip(batches, answers))]
        return merged(len(batch), zip(parts, scored))

    def close(self) -> None:
        for at, worker in enumerate(self._workers):
            if worker is not None:
                worker.kill()
                self._workers[at] = None

    def _ask(self, at: int, batch: RewardBatch) -> Callable[[], Scores | str]:
        """Send a batch to a worker; returns what waits for the answer, or for the text that says what is wrong."""
        worker = self._workers[at]
        if worker is None or not worker.running:
            worker = self._workers[at] = _Worker(self.function.name, self.timeout)
        worker.send((self.function.arguments(batch), len(batch)), self.timeout)
        return worker.receive

    def _checked(self, at: int, batch: RewardBatch, answer: Scores | str) -> Scores:
        """The scores of a batch whose answer may be wrong as a whole."""
        known = [answer]

        def score(part: RewardBatch) -> Scores:
            found = known.pop() if known else self._ask(at, part)()
            if isinstance(found, str):
                raise WrongAnswer(found)
            return found

        return score_singly_if_wrong(batch, score, self.every_failure)


class _Worker:
    """One process, which loads the function and then answers requests, one at a time.

    Args:
        timeout: seconds that a call may take, and beside those that are usual for a start, the import too.
    """

    def __init__(self, name: str, timeout: float):
        self.connection, theirs = Pipe()
        with theirs:
            arguments = [str(theirs.fileno()), str(os.getpid()), name]
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "common.rewards.worker", *arguments],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
            )
        self._problem: str | None = None
        self._limit = timeout + _START_SECONDS
        self._deadline = time.monotonic() + self._limit
        self._problem = self.receive()
        if self._problem is not None:
            self.kill()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def send(self, request: Any, timeout: float) -> None:
        """Send a request; its answer must come within `timeout` seconds."""
        self._limit, self._deadline = timeout, time.monotonic() + timeout
        with contextlib.suppress(OSError):  # the process has gone, which `receive` reports
            self.connection.send(request)

    def receive(self) -> Any:
        """The answer to the last request; a text where something is wrong. At the start None where nothing is."""
        if self._problem is not None:
            return self._problem
        try:
            if self.connection.poll(max(self._deadline - time.monotonic(), 0)):
                return self.connection.recv()
            why = f"it gave no answer within {self._limit:g} seconds (--reward_timeout)"
        except (EOFError, OSError):
            self.process.wait()
            why = f"it ended its process with the code {self.process.returncode}"
        self.kill()
        return why

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
