"""Starts and ends a program: environment, process group, exit code.

`run_program` turns a main function into an exit code; `launch` is the same for a file of your own that trains.
DeepSpeed is imported inside functions, after `prepare_environment` has run: it chooses its accelerator and its compiled
operators while it is imported.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, ParamSpec

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
    local_world_size,
    on_every_rank,
    on_gpu,
    rank,
    say,
    world_size,
)
from common.runtime.requirements import begin_program
from common.runtime.streams import reopen_closed, tolerate_write_errors

_FIRST_PORT, _PORTS = 20_000, 9_000  # below the ports that systems give to outgoing connections

Parameters = ParamSpec("Parameters")


def prepare_environment() -> None:
    """Set one rank if there is no launcher, choose the accelerator, and divide the CPU cores among the ranks."""
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
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # their threads do not survive a fork
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if "OMP_NUM_THREADS" not in os.environ:
        if not on_gpu() or local_world_size() > 1:
            torch.set_num_threads(max(1, cores() // local_world_size()))


def start(timeout_seconds: int, seed: int) -> None:
    """Join the process group, and seed torch alike on every rank, so that all ranks make the same new weights.

    Prepare data before this call: that may take longer than a collective may wait.

    Args:
        timeout_seconds: how long a collective may wait for the slowest rank.

    Raises:
        UserError: the port is in use.
    """
    torch.manual_seed(seed)
    import deepspeed
    import deepspeed.ops

    # DeepSpeed's shared-memory all-reduce for CPUs needs a compiler at every start and leaves 66 MiB per rank in
    # /dev/shm. Without it gloo does the work.
    if not on_gpu():
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    timeout = timedelta(seconds=timeout_seconds)
    # The argument of init_distributed holds for the first group only. DeepSpeed makes others for its engines.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    _replace_default_port()
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


def _replace_default_port() -> None:
    """Replace the launcher's default port, which a second run on this machine would get too, by one of this run."""
    from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT

    launchers = watchdog.launchers()
    if (
        launchers
        and local_world_size() == world_size()
        and os.environ["MASTER_PORT"] == str(TORCH_DISTRIBUTED_DEFAULT_PORT)
    ):
        os.environ["MASTER_PORT"] = str(_FIRST_PORT + launchers[-1].pid % _PORTS)


def finish() -> None:
    """Leave the process group together with all ranks. Without this some processes abort while they exit."""
    watchdog.detach()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def stop_agreed(failure: str | None = None) -> str:
    """Agree on all ranks whether the run stops. All ranks must call it.

    Args:
        failure: the message of an error of this rank that must end the run; None if there is none.

    Returns:
        The reason why a rank was asked to stop, or ''; the same on every rank.

    Raises:
        TrainingFailure: a rank has a failure; raised on all ranks with the same message.
    """
    if on_every_rank(failure is None and signals.stop_requested() is None):
        return ""
    of_ranks = gather_objects((failure, signals.stop_requested()))
    for rank_failure, _ in of_ranks:
        if rank_failure is not None:
            raise TrainingFailure(rank_failure)
    return next(reason for _, reason in of_ranks if reason)


def launch(main: Callable[Parameters, object], *args: Parameters.args, **kwargs: Parameters.kwargs) -> NoReturn:
    """Run the main function of a training step from a file of your own, and exit the process.

    The file gets what the step's own program has: signals that stop it with a checkpoint, the watch on the launcher and
    on other ranks, errors in one line, and the exit codes of `run_program`. It ends with::

        if __name__ == "__main__":
            launch(main)  # `from step3_ppo.main import main`; arguments of main go here

    and starts like the step: `deepspeed --num_gpus N my_experiment.py --FLAG ...`. Python must find the project's
    packages: install the project, or put the file into the root of the repository.

    Args:
        main: called with the other arguments; it reads the command line itself.

    Raises:
        SystemExit: always; ranks of a process group end without it, see `run_program`.
    """
    begin_program(trains=True)
    sys.exit(run_program(main, *args, **kwargs))


def run_program(program: Callable[Parameters, object], *args: Parameters.args, **kwargs: Parameters.kwargs) -> int:
    """Call the main function of a program, and turn its outcome into an exit code and at most one line of error.

    Args:
        program: called with the other arguments.

    Returns:
        The exit code:
        0 if it succeeded, or if its result existed already (`AlreadyComplete`);
        1 for `TrainingFailure`, and for any other exception with its traceback;
        2 for `UserError`;
        75 for `Stopped`: it was asked to stop and has saved its state;
        130 for Ctrl-C in a program that does not train.
        Ranks of a process group do not return but end here, with the same code.
    """
    reopen_closed()
    tolerate_write_errors()
    prepare_environment()
    try:
        program(*args, **kwargs)
        return _exit_together(0)
    except AlreadyComplete as result:
        say(str(result))
        return _exit_together(0)
    except signals.Stopped as stop:
        signals.ignore_signals()
        say(str(stop))
        return _exit_together(signals.STOPPED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)  # on stderr: standard output may carry the result
        return 130
    except Exception as error:
        return _exit_failed(error)


def _exit_together(code: int) -> int:
    """End without an error, together with the other ranks. Returns the exit code if there are no others.

    With others the process skips Python's own exit. That sometimes aborts, because threads of torch and gloo run on.
    """
    alone = watchdog.peers() is None
    finish()
    if not alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _exit_failed(error: Exception) -> int:
    """Print on one rank, as its last line, why the run ends. Returns the exit code if there are no other ranks."""
    code = 2 if isinstance(error, UserError) else 1
    cause: str | None = ""  # of this failure in another rank; None if another rank reports it
    if (peers := watchdog.peers()) is not None:
        cause = peers.announce_failure(code)
    elif not is_main():
        # Before there is a process group: rank 0 usually has the same error and reports it, and the launcher then ends
        # this rank while it sleeps.
        time.sleep(5)
    if cause is not None:
        if isinstance(error, (UserError, TrainingFailure)):
            cause = cause or str(error)
        elif not cause:
            traceback.print_exception(error)
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            if peers is not None:
                cause = f"rank {rank()}, in {peers.describe()}: {cause}"
        print(f"error: {cause}", file=sys.stderr, flush=True)
    if peers is not None:
        os._exit(code)  # Python's own exit may wait for ranks that have gone
    return code


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
