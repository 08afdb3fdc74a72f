"""What a rank knows of the other ranks: that they live, in which phase they are, what they were told, who has failed.

A thread of every rank says so in the process group's store once a second and reads what the others say. A rank is lost
when its process has gone (seen at once on the same machine), and hangs when nothing has been heard of it for the
timeout. The store lives in rank 0: when that hangs, no question is answered, so nobody but the thread may ask any.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time

import psutil

from common.runtime import signals

INTERVAL = 1.0  # seconds from one message to the next
LINGER = 5.0  # seconds that a rank which fails gives the others at most to end before it
_FAILED = "failed"

_phase = "the start"


def set_phase(phase: str) -> None:
    """Say what this rank does from here on."""
    global _phase
    _phase = phase


class Peers:
    """The other ranks, seen from this one.

    Args:
        store: of the process group.
        timeout: seconds of silence after which a rank is taken to hang.
    """

    def __init__(self, store, rank: int, ranks: int, timeout: int):
        self.rank, self.ranks, self.timeout = rank, ranks, timeout
        self.others = [other for other in range(ranks) if other != rank]
        self.phases = dict.fromkeys(range(ranks), "the start")
        self.silent = dict.fromkeys(self.others, 0)  # looks since something was heard of a rank
        self.unanswered = 0  # looks since the store answered
        self.failed: tuple[int, int] | None = None  # the rank that failed first, and its exit code
        self.failing: int | None = None  # the exit code with which this rank is about to fail
        self._processes: dict[int, psutil.Process | None] | None = None  # those on this machine, once known
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._exchange, args=(store.clone(),), daemon=True)
        self._thread.start()

    def look(self, launcher_gone: bool = False) -> None:
        """End this process if the run cannot go on; to be called once a second.

        Without a launcher all ranks end, one perhaps a moment before the others: that is no error of its own.
        """
        self.unanswered += 1
        for other in self.others:
            self.silent[other] += 1
        if self._over.is_set() or self.failing is not None:
            return
        if trouble := self.lost() or self.hanging(max(self.timeout, 5)):
            if self._speaks(trouble):
                signals.write(
                    f"{'the launcher has gone, and' if launcher_gone else 'error:'} {describe_trouble(trouble)}",
                    on_every_rank=True,
                )
            os._exit(signals.STOPPED if launcher_gone else 1)
        if self.failed:
            self._let_others_read()
            os._exit(self.failed[1])

    def lost(self) -> dict[int, str]:
        """Ranks whose process has ended, and what is to be said of it."""
        return {
            other: f"has ended without a word, in {self.phases[other]} (killed, perhaps for want of memory)"
            for other, process in (self._processes or {}).items()
            if not lives(process)
        }

    def hanging(self, looks: float) -> dict[int, str]:
        """Ranks of which nothing was heard for so many looks, and what is to be said of it."""
        hanging = (
            [0]
            if self.rank and self.unanswered > looks
            else [other for other in self.others if self.silent[other] > looks]
        )
        return {
            other: f"has not been heard of for --timeout {self.timeout} seconds; it was in {self.phases[other]}"
            for other in hanging
        }

    def fail(self, code: int) -> str | None:
        """Announce that this rank ends by an error, and wait until the others have ended, or a moment.

        Returns:
            None if another rank says why the run ended; else what is known of a rank that is the cause, or ''.
        """
        signals.ignore_signals()
        time.sleep(0.2)  # a process that dies closes its connections first
        trouble = self.lost()  # before the others hear of this failure, and end
        self.failing = code
        deadline = time.monotonic() + LINGER
        while time.monotonic() < deadline and not (self.failed and (self.failed[0] != self.rank or self._all_gone())):
            trouble = trouble or self.hanging(self.timeout / 2)
            time.sleep(0.1)
        if self._speaks(trouble):
            return describe_trouble(trouble)
        self._let_others_read()
        return None

    def describe(self) -> str:
        """The phase of this rank, and, where they are in another, of the others."""
        elsewhere = [f"rank {other} in {self.phases[other]}" for other in self.others if self.phases[other] != _phase]
        return f"{_phase} ({', '.join(elsewhere)})" if elsewhere else _phase

    def leave(self) -> None:
        """The run has ended well: nobody is missed from here on."""
        self._over.set()
        self._thread.join(LINGER)

    def _speaks(self, trouble: dict[int, str]) -> bool:
        """Whether it is for this rank to say what happened: the first to fail, or else the lowest that can."""
        if self.failed:
            return self.failed[0] == self.rank
        return self.rank == min(rank for rank in range(self.ranks) if rank not in trouble)

    def _let_others_read(self) -> None:
        if self.rank == 0:  # which takes the store with it
            time.sleep(2 * INTERVAL)

    def _all_gone(self) -> bool:
        processes = self._processes or {}
        return len(processes) == len(self.others) and not any(map(lives, processes.values()))

    def _exchange(self, store) -> None:
        """The thread's work. Any call may block for long, or fail, once rank 0 does not answer."""
        count = 0
        seen: dict[int, int] = {}
        while not (count and self._over.wait(INTERVAL)):
            count += 1
            try:
                if self._processes is None:
                    self._processes = self._meet(store)
                store.set(f"message/{self.rank}", json.dumps([count, _phase, signals.stop_requested()]))
                if self.failing is not None:
                    store.compare_set(_FAILED, "", json.dumps([self.rank, self.failing]))
                *messages, failed = store.multi_get([*(f"message/{rank}" for rank in range(self.ranks)), _FAILED])
            except RuntimeError:
                continue
            self.unanswered = 0
            for other in self.others:
                number, self.phases[other], told = json.loads(messages[other])
                if seen.get(other) != number:
                    seen[other], self.silent[other] = number, 0
                if told and signals.training_started() and not signals.stop_requested():
                    signals.request_stop(told)
            if failed:
                self.failed = tuple(json.loads(failed))

    def _meet(self, store) -> dict[int, psutil.Process | None]:
        if self.rank == 0:
            store.set(_FAILED, "")
        ours = psutil.Process()
        parent = ours.parent()
        # Ranks of one launcher are on one machine and see each other's processes.
        launcher = [socket.gethostname(), parent.pid, parent.create_time()] if parent else [socket.gethostname()]
        store.set(f"process/{self.rank}", json.dumps([launcher, ours.pid]))
        processes: dict[int, psutil.Process | None] = {}
        for other, found in zip(self.others, store.multi_get([f"process/{other}" for other in self.others])):
            its_launcher, pid = json.loads(found)
            if its_launcher == launcher:
                try:
                    processes[other] = psutil.Process(pid)
                except psutil.NoSuchProcess:
                    processes[other] = None
        return processes


def describe_trouble(trouble: dict[int, str]) -> str:
    """Ranks in trouble, in one line; '' if there are none."""
    return "; ".join(f"rank {rank} {what}" for rank, what in trouble.items())


def lives(process: psutil.Process | None) -> bool:
    """Whether it runs: has not ended, unnoticed by its parent or not."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
