"""Provides ranks, their devices and memory, and collectives. Without a process group there is one rank."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from tqdm import tqdm

_CGROUP = Path("/sys/fs/cgroup")

Item = TypeVar("Item")


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
    """Whether this is rank 0, which prints and writes results."""
    return rank() == 0


def say(message: str) -> None:
    """Print a line on rank 0, above the progress bar if one is shown."""
    if is_main():
        tqdm.write(message)
        sys.stdout.flush()


def on_gpu() -> bool:
    """Whether this run uses GPUs: CUDA is available, and DS_ACCELERATOR is not `cpu`."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def device() -> torch.device:
    """The device of this rank: its own GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if on_gpu() else torch.device("cpu")


def seed_rank(seed: int) -> None:
    """Seed torch differently on every rank, for dropout."""
    torch.manual_seed(seed + 1 + rank())


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()


def global_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor of any shape over all ranks; the input is not changed."""
    total = values.detach().clone()
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(total)
    return total


def global_max(values: torch.Tensor) -> torch.Tensor:
    """The maximum over all ranks of each number of a tensor; the input is not changed."""
    largest = values.detach().clone()
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def on_every_rank(condition: bool) -> bool:
    """Whether the condition holds on all ranks. All ranks must call it and get the same answer."""
    return int(global_sum(torch.tensor(int(not condition), device=device()))) == 0


def memory_available() -> int:
    """Bytes that this rank may still allocate: on its GPU, or its share of the memory of its machine."""
    if on_gpu():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min([psutil.virtual_memory().available, *_available_in_cgroup()]) // local_world_size()


def _available_in_cgroup() -> list[int]:
    """Bytes left under the memory limit of a container, if it has one.

    Inactive file cache counts as left, because the kernel frees it on demand.
    """
    available = []
    for limit, usage, cached in (
        ("memory.max", "memory.current", "inactive_file"),  # cgroup 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):  # another version of cgroups, or no limit ("max")
            free = int((_CGROUP / limit).read_text()) - int((_CGROUP / usage).read_text())
            statistics = (_CGROUP / limit).with_name("memory.stat").read_text().splitlines()
            available.append(max(free, 0) + int(dict(line.split() for line in statistics)[cached]))
    return available


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_world_size() -> int:
    """Number of ranks on this machine. The deepspeed launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def gather_objects(item: Item) -> list[Item]:
    """The picklable items of all ranks in the order of ranks, on every rank."""
    if not dist.is_initialized() or world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_main(item: Item) -> Item:
    """The picklable item of rank 0, on every rank; those of the others are ignored. All ranks must call it."""
    if not dist.is_initialized() or world_size() == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]
