"""Start and end of a program: one process per rank, one voice, sums over ranks.

Nothing here imports DeepSpeed before `prepare_environment` has run, because DeepSpeed chooses its
accelerator and its compiled operators while it is imported.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import datasets
import psutil
import torch
import torch.distributed as dist
import transformers
from torch.distributed import distributed_c10d
from tqdm import tqdm

from common.errors import AlreadyComplete, TrainingFailure, UserError
from common.runtime import heartbeat, signals, watchdog
from common.runtime.streams import open_closed, outlast_readers

_CGROUP = Path("/sys/fs/cgroup")
_FIRST_OWN_PORT, _OWN_PORTS = 20_000, 9_000  # below those that systems give to connections


def rank() -> int:
    """Global rank of this process, known from the launcher's environment before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of ranks over all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one rank that prints and writes results."""
    return rank() == 0


def say(message: str) -> None:
    """Print a line on rank 0 only, above a progress bar if one is shown."""
    if is_main():
        tqdm.write(message)
        sys.stdout.flush()


def on_gpu() -> bool:
    """Whether this run uses GPUs: there are some, and DS_ACCELERATOR does not ask DeepSpeed for the CPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device() -> torch.device:
    """The device of this rank: its own GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if on_gpu() else torch.device("cpu")


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


def seed_rank(seed: int) -> None:
    """From here on every rank draws random numbers of its own, for dropout."""
    torch.manual_seed(seed + 1 + rank())


def finish() -> None:
    """Leave the process group together; without it some exits abort."""
    watchdog.detach()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()


def global_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor of any shape over all ranks; the input stays as it is."""
    total = values.detach().clone()
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(total)
    return total


def on_every_rank(condition: bool) -> bool:
    """Whether it holds on all ranks; the same answer on each."""
    return int(global_sum(torch.tensor(int(not condition), device=device()))) == 0


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


def memory_available() -> int:
    """Bytes that this rank may still take: on its GPU, or its share of the machine's memory."""
    if on_gpu():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min([psutil.virtual_memory().available, *_left_by_cgroup()]) // ranks_here()


def _left_by_cgroup() -> list[int]:
    """Bytes left of what a container may take, if it is limited; the kernel gives back what caches unused files."""
    found = []
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),  # cgroup 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such version, or a limit of "max"
            room = int((_CGROUP / limit).read_text()) - int((_CGROUP / usage).read_text())
            counts = dict(line.split() for line in (_CGROUP / limit).with_name("memory.stat").read_text().splitlines())
            found.append(max(room, 0) + int(counts[cached]))
    return found


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_here() -> int:
    """Ranks on this machine. The deepspeed launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def gather_objects(item) -> list:
    """Every rank's picklable item, in the order of ranks, on every rank."""
    if not dist.is_initialized() or world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


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
