"""Start and end of a program.

Nothing here imports DeepSpeed before `prepare_environment` has run, because DeepSpeed chooses its
accelerator and its compiled operators while it is imported.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta

import datasets
import torch
import torch.distributed as dist
import transformers
from torch.distributed import distributed_c10d

from common.errors import AlreadyComplete, TrainingFailure, UserError
from common.runtime import heartbeat, signals, watchdog
from common.runtime.distributed import (
    cores,
    gather_objects,
    is_main,
    local_rank,
    on_every_rank,
    on_gpu,
    rank,
    ranks_here,
    say,
    world_size,
)
from common.runtime.streams import open_closed, outlast_readers

_FIRST_OWN_PORT, _OWN_PORTS = 20_000, 9_000  # below those that systems give to connections


def prepare_environment() -> None:
    """Make `python main.py` one rank, choose the accelerator, and share the CPU's cores between ranks."""
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
        )
    if on_gpu():
        torch.cuda.set_device(local_rank())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers' threads do not survive a fork
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if "OMP_NUM_THREADS" not in os.environ:
        if not on_gpu() or ranks_here() > 1:
            torch.set_num_threads(max(1, cores() // ranks_here()))


def start(timeout_seconds: int, seed: int) -> None:
    """Join the process group and seed torch alike on every rank, for new weights that all ranks must agree on.

    Data must be prepared before: it may outlast any collective's timeout.

    Args:
        timeout_seconds: how long a collective may wait for the slowest rank.

    Raises:
        UserError: another run has the port, as two with the launcher's default have.
    """
    torch.manual_seed(seed)
    import deepspeed
    import deepspeed.ops

    # The shared-memory all-reduce for CPUs needs a compiler at every start and leaves 66 MiB per rank behind
    # in /dev/shm; gloo serves without either.
    if not on_gpu():
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    timeout = timedelta(seconds=timeout_seconds)
    # Of the groups that DeepSpeed makes for its engines; what init_distributed is told holds for the first alone.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    _take_own_port()
    try:
        deepspeed.init_distributed(timeout=timeout, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} is in use, mostly by another run on this machine: give "
            "deepspeed another, --master_port N before the program's name"
        ) from None
    watchdog.start()
    watchdog.attach(distributed_c10d._get_default_store(), rank(), world_size(), timeout_seconds)
    heartbeat.set_phase("the loading of models")


def _take_own_port() -> None:
    """In the place of the launcher's default port, which a second run on this machine would be given too."""
    from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

    launchers = watchdog.launchers()
    if launchers and ranks_here() == world_size() and os.environ["MASTER_PORT"] == str(TORCH_DISTRIBUTED_DEFAULT_PORT):
        os.environ["MASTER_PORT"] = str(_FIRST_OWN_PORT + launchers[-1].pid % _OWN_PORTS)


def finish() -> None:
    """Leave the process group together; without it some exits abort."""
    watchdog.detach()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def stop_agreed(trouble: str | None = None) -> str:
    """What told the run to stop, or ''; the same on every rank. All ranks must call it.

    Raises:
        TrainingFailure: a rank has `trouble`, which it is the message of; on all ranks alike.
    """
    if on_every_rank(trouble is None and signals.stop_requested() is None):
        return ""
    everyone = gather_objects((trouble, signals.stop_requested()))
    for theirs, _ in everyone:
        if theirs is not None:
            raise TrainingFailure(theirs)
    return next(filter(None, (told for _, told in everyone)))


def run_program(program: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a program's main function and turn what the user can mend into one line and exit code 2.

    Returns:
        The exit code: 0, also where the result was there already; 2 for `UserError`; 75 for a run that was told to stop
        and has saved its state; 130 for Ctrl-C in a program that does not train; 1 for anything else, with a traceback
        if it is no `TrainingFailure`.
    """
    open_closed()
    outlast_readers()
    prepare_environment()
    try:
        program(argv)
        return _leave(0)
    except AlreadyComplete as there:
        say(str(there))
        return _leave(0)
    except signals.Stopped as stop:
        signals.ignore_signals()
        say(str(stop))
        return _leave(signals.STOPPED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)  # standard output may be answers
        return 130
    except Exception as error:
        return _fail(error)


def _leave(code: int) -> int:
    """End well, together with the other ranks; returns the exit code where there are none.

    Python's own end is skipped: with threads of torch and gloo about, now and then it aborts, after all is done.
    """
    alone = watchdog.peers() is None
    finish()
    if not alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _fail(error: Exception) -> int:
    """Say on one rank, and last of all, why the run ends; returns the exit code."""
    code = 2 if isinstance(error, UserError) else 1
    cause: str | None = ""
    if (others := watchdog.peers()) is not None:
        cause = others.fail(code)
    elif not is_main():
        # Rank 0 mostly meets the same error and says it; the launcher then ends this rank while it sleeps.
        time.sleep(5)
    if cause is not None:
        if isinstance(error, (UserError, TrainingFailure)):
            cause = cause or str(error)
        elif not cause:
            traceback.print_exception(error)
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            if others is not None:
                cause = f"rank {rank()}, in {others.describe()}: {cause}"
        print(f"error: {cause}", file=sys.stderr, flush=True)
    if others is not None:
        os._exit(code)  # others may be gone, and what Python does at its end may wait for them
    return code


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
