"""Ranks and collectives: one process per rank, one voice, sums over ranks."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from tqdm import tqdm

_CGROUP = Path("/sys/fs/cgroup")


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


def seed_rank(seed: int) -> None:
    """From here on every rank draws random numbers of its own, for dropout."""
    torch.manual_seed(seed + 1 + rank())


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
