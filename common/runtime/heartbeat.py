"""Exchanges messages between ranks: signs of life, phases, requests to stop, failures.

Once a second a thread of every rank writes a message to the process group's store and reads those of the others. A rank
is lost when its process has ended, which other ranks on the same machine see at once. A rank hangs when it has sent no
message for the timeout. The store lives in rank 0. When rank 0 hangs, every call to the store blocks, so no other
thread may use it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import psutil

from common.runtime import signals

if TYPE_CHECKING:  # torch is slow to import, and the watchdog starts before it
    from torch.distributed import Store

INTERVAL = 1.0  # seconds between two messages
LINGER = 5.0  # most seconds that a failing rank waits for the others to end first
_FIRST_FAILURE = "failed"  # key in the store

_phase = "the start"


def set_phase(phase: str) -> None:
    """Set the phase of this rank, which messages name; a noun phrase."""
    global _phase
    _phase = phase


class Peers:
    """The other ranks as this rank knows them.

    Args:
        store: of the process group.
        timeout: seconds without a message after which a rank counts as hanging.

    Attributes:
        phases: the last known phase of each rank.
        checks_since_message: per other rank, calls of `check` since its last message.
        checks_since_answer: calls of `check` since the store last answered.
        first_failure: the rank that failed first and its exit code, once a rank has failed.
        exit_code: the code with which this rank is about to fail.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: int):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.others = [other for other in range(world_size) if other != rank]
        self.phases = dict.fromkeys(range(world_size), "the start")
        self.checks_since_message = dict.fromkeys(self.others, 0)
        self.checks_since_answer = 0
        self.first_failure: tuple[int, int] | None = None
        self.exit_code: int | None = None
        # Processes of the ranks on this machine, once known; None for one that had ended by then.
        self._processes: dict[int, psutil.Process | None] | None = None
        self._finished = threading.Event()
        own_store = store.clone()  # type: ignore[attr-defined]  # torch's type stub lacks the method
        self._thread = threading.Thread(target=self._exchange_messages, args=(own_store,), daemon=True)
        self._thread.start()

    def check(self, launcher_gone: bool = False) -> None:
        """End this process if the run cannot go on. Call it once a second.

        Args:
            launcher_gone: the launcher has gone, so all ranks end soon; another rank that has ended is no error.
        """
        self.checks_since_answer += 1
        for other in self.others:
            self.checks_since_message[other] += 1
        if self._finished.is_set() or self.exit_code is not None:
            return
        if faults := self.lost_ranks() or self.hanging_ranks(max(self.timeout, 5)):
            if self._reports(faults):
                signals.write_stderr(
                    f"{'the launcher has gone, and' if launcher_gone else 'error:'} {describe_faults(faults)}",
                    on_every_rank=True,
                )
            os._exit(signals.STOPPED if launcher_gone else 1)
        if self.first_failure:
            self._wait_for_readers()
            os._exit(self.first_failure[1])

    def lost_ranks(self) -> dict[int, str]:
        """Ranks on this machine whose process has ended, each with a predicate for the message."""
        return {
            other: f"has ended without a word, in {self.phases[other]} (killed, perhaps for want of memory)"
            for other, process in (self._processes or {}).items()
            if not is_running(process)
        }

    def hanging_ranks(self, checks: float) -> dict[int, str]:
        """Ranks that have sent no message for more than `checks` checks, each with a predicate for the message.

        If the store does not answer, only rank 0 counts: the messages of the others cannot be read.
        """
        if self.rank and self.checks_since_answer > checks:
            hanging = [0]
        else:
            hanging = [other for other in self.others if self.checks_since_message[other] > checks]
        return {
            other: f"has not been heard of for --timeout {self.timeout} seconds; it was in {self.phases[other]}"
            for other in hanging
        }

    def announce_failure(self, exit_code: int) -> str | None:
        """Tell the others that this rank ends with an error, and wait at most `LINGER` seconds until they have ended.

        Returns:
            None if another rank reports why the run ended. Otherwise this rank reports: a description of the rank that
            caused the failure if one is known, else ''.
        """
        signals.ignore_signals()
        time.sleep(0.2)  # the connections of a process close a moment before it has ended
        faults = self.lost_ranks()  # before the others learn of this failure and end too
        self.exit_code = exit_code
        deadline = time.monotonic() + LINGER
        while time.monotonic() < deadline:
            if self.first_failure and (self.first_failure[0] != self.rank or self._others_ended()):
                break
            faults = faults or self.hanging_ranks(self.timeout / 2)
            time.sleep(0.1)
        if self._reports(faults):
            return describe_faults(faults)
        self._wait_for_readers()
        return None

    def describe(self) -> str:
        """The phase of this rank and of each rank that is in another phase."""
        elsewhere = [f"rank {other} in {self.phases[other]}" for other in self.others if self.phases[other] != _phase]
        return f"{_phase} ({', '.join(elsewhere)})" if elsewhere else _phase

    def stop(self) -> None:
        """Stop sending and checking: the run has ended well, and other ranks may end."""
        self._finished.set()
        self._thread.join(LINGER)

    def _reports(self, faults: dict[int, str]) -> bool:
        """Whether this rank prints the error: the first to fail, or else the lowest rank without a fault."""
        if self.first_failure:
            return self.first_failure[0] == self.rank
        return self.rank == min(rank for rank in range(self.world_size) if rank not in faults)

    def _wait_for_readers(self) -> None:
        """Rank 0 holds the store: give the others time to read it before it ends."""
        if self.rank == 0:
            time.sleep(2 * INTERVAL)

    def _others_ended(self) -> bool:
        processes = self._processes or {}
        return len(processes) == len(self.others) and not any(map(is_running, processes.values()))

    def _exchange_messages(self, store: Store) -> None:
        """Body of the thread. Every call to the store may block or fail once rank 0 does not answer."""
        count = 0
        last_counts: dict[int, int] = {}
        while not (count and self._finished.wait(INTERVAL)):
            count += 1
            try:
                if self._processes is None:
                    self._processes = self._find_processes(store)
                store.set(f"message/{self.rank}", json.dumps([count, _phase, signals.stop_requested()]))
                if self.exit_code is not None:
                    store.compare_set(_FIRST_FAILURE, "", json.dumps([self.rank, self.exit_code]))
                keys = [f"message/{rank}" for rank in range(self.world_size)]
                *messages, first_failure = store.multi_get([*keys, _FIRST_FAILURE])
            except RuntimeError:
                continue
            self.checks_since_answer = 0
            for other in self.others:
                other_count, self.phases[other], stop_reason = json.loads(messages[other])
                if last_counts.get(other) != other_count:
                    last_counts[other], self.checks_since_message[other] = other_count, 0
                if stop_reason and signals.training_started() and not signals.stop_requested():
                    signals.request_stop(stop_reason)
            if first_failure:
                rank, exit_code = json.loads(first_failure)
                self.first_failure = rank, exit_code

    def _find_processes(self, store: Store) -> dict[int, psutil.Process | None]:
        """The processes of the other ranks that the same launcher has started, so that they are on this machine."""
        if self.rank == 0:
            store.set(_FIRST_FAILURE, "")
        process = psutil.Process()
        parent = process.parent()
        launcher = [socket.gethostname(), parent.pid, parent.create_time()] if parent else [socket.gethostname()]
        store.set(f"process/{self.rank}", json.dumps([launcher, process.pid]))
        entries = store.multi_get([f"process/{other}" for other in self.others])
        processes: dict[int, psutil.Process | None] = {}
        for other, entry in zip(self.others, entries):
            other_launcher, pid = json.loads(entry)
            if other_launcher == launcher:
                try:
                    processes[other] = psutil.Process(pid)
                except psutil.NoSuchProcess:
                    processes[other] = None
        return processes


def describe_faults(faults: dict[int, str]) -> str:
    """The faults of ranks in one line; '' if there are none."""
    return "; ".join(f"rank {rank} {predicate}" for rank, predicate in faults.items())


def is_running(process: psutil.Process | None) -> bool:
    """Whether a process runs. A zombie, which its parent has not waited for, has ended."""
    try:
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
