"""The process in which a reward function runs: `python -m common.rewards.worker FD PARENT FUNCTION`.

It gets (arguments, responses) through the connection of file descriptor FD, and sends back `Scores`, or a text that
says what is wrong. It ends when the connection is closed, or PARENT, the process that started it, is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from common.rewards.answers import WrongAnswer
from common.rewards.errors import RewardError
from common.rewards.function import load_function


def main(descriptor: int, parent: int, name: str) -> None:
    """Answer requests until there are no more."""
    # The process that started this one decides when a run ends, and saves its state first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    connection = Connection(descriptor)
    try:
        function = load_function(name)
    except RewardError as error:
        connection.send(error.why)
        return
    connection.send(None)
    while True:
        try:
            arguments, responses = connection.recv()
        except EOFError:
            return
        try:
            connection.send(function(arguments, responses))
        except WrongAnswer as error:
            connection.send(str(error))


def _watch(parent: int) -> None:
    """End this process, whatever it does, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
