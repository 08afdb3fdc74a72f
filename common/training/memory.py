"""Measures how large micro-batches may be (--auto_micro_batch), and reports a failed allocation in one line.

The line names the phase and the options that reduce its memory. Options declare the phases in `Option.relieves`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from common.config.groups import ScheduleOptions
from common.config.option import Phase
from common.config.parser import Config, options
from common.errors import TrainingFailure
from common.models.engine import Engine
from common.runtime.distributed import device, memory_available, on_every_rank, on_gpu, rank, say

USABLE = 0.8  # of the free memory; the rest is for fragmentation, buffers of the optimizer, and other programs
MAX_TOKENS = "max_tokens"  # key, in a checkpoint's `state_dict`, of the --max_tokens_per_micro_batch that a run used
_PRECISION = 8  # the bisection ends when the number of rows is known to within 1/8

ScheduleType = TypeVar("ScheduleType", bound=ScheduleOptions)


class OutOfMemory(TrainingFailure):
    """An allocation failed.

    Attributes:
        phase: the phase of the run, in words.
    """

    def __init__(self, phase: str, size: str):
        super().__init__(f"out of memory on rank {rank()} in {phase}, which asked for {size} more")
        self.phase = phase


@contextlib.contextmanager
def named_when_out_of_memory(phase: str) -> Iterator[None]:
    """Within the context, a failed allocation raises OutOfMemory with the phase and the size.

    Raises:
        OutOfMemory: on the ranks that ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        size = requested_size(error)
        if size is None:
            raise
        raise OutOfMemory(phase, size) from None


@contextlib.contextmanager
def advising_on_memory(config: Config) -> Iterator[None]:
    """Within the context, the message of an OutOfMemory also says which options of the program help.

    Raises:
        TrainingFailure: with the longer message.
    """
    try:
        yield
    except OutOfMemory as failure:
        raise TrainingFailure(f"{failure}: {memory_advice(config, failure.phase)}") from None


def memory_advice(config: Config, phase: str) -> str:
    """How to change the options that relieve a phase, as in "lower --a or --b, or add --c".

    Options without effect, and those that are on already, are left out.
    """
    known, useless = options(type(config)), config.useless_options()
    helpful = [name for name in known if name not in useless and getattr(config, name) is not True]
    relieving = [name for name in helpful if phase in known[name].relieves] or [
        name for name in helpful if Phase.ANYWHERE in known[name].relieves
    ]
    if not relieving:
        return "use a smaller model, or more memory"
    flags: dict[str, list[str]] = {}
    for name in relieving:
        flags.setdefault(known[name].advice, []).append(f"--{name}")
    *others, last = [advice.format(flag=" or ".join(names)) for advice, names in flags.items()]
    return f"{', '.join(others)}, or {last}" if others else last


def requested_size(error: Exception) -> str | None:
    """The size of the allocation that failed, as text; None if the error has another cause."""
    size = re.search(r"(?:tried to allocate|unable to allocate) ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    if size:
        return size[1]
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "std::bad_alloc" in str(error)
    return "an unknown amount" if out_of_memory else None


def fit_micro_batches(
    config: ScheduleType,
    saved_max_tokens: int | None,
    engines: Sequence[Engine],
    probe: Callable[[int], None],
    longest: int,
    rows: int,
) -> ScheduleType:
    """The config with the --max_tokens_per_micro_batch that --auto_micro_batch measures; unchanged without that option.

    Optimizer steps keep their rows, so their loss and gradients are the same. Afterwards weights, gradients and random
    state are as before. All ranks must call it.

    Args:
        saved_max_tokens: the value that the interrupted run measured. Rounding depends on the value, so a resumed run
            uses it and measures nothing.
        engines: the engines that train.
        probe: runs forward and backward on this many of the longest rows together, and discards the gradients.
        longest: tokens of the longest row.
        rows: number of rows of one optimizer step on one rank; a micro-batch has at most as many.
    """
    if not config.auto_micro_batch:
        return config
    max_tokens = saved_max_tokens
    if not max_tokens:
        free = USABLE * memory_available() - sum(map(unallocated_optimizer_state, engines))
        with (
            torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu() else []),
            advising_on_memory(config),
            named_when_out_of_memory("the probe of --auto_micro_batch"),
        ):
            fitting = most_that_fit(probe, rows, free)
        max_tokens = fitting * longest
        say(
            f"--auto_micro_batch: {fitting} of the longest rows fit together, so --max_tokens_per_micro_batch is "
            f"{max_tokens}"
        )
    return replace(config, auto_micro_batch=False, max_tokens_per_micro_batch=max_tokens)


def most_that_fit(probe: Callable[[int], None], most: int, free: float) -> int:
    """The largest number of rows, at least 1 and at most `most`, whose probe needs at most `free` bytes on any rank.

    Before a probe, every rank extrapolates its memory linearly from the two largest probes so far. The probe is run
    only if all ranks expect it to fit: if one rank ran out of memory during a pass, the others would wait for it.
    """
    start = _allocated_bytes()
    taken = {0: 0, 1: _peak_of(lambda: probe(1)) - start}  # one row is tried in any case: the run needs that much

    def fits(rows: int) -> bool:
        below, above = sorted(taken)[-2:]
        growth = (taken[above] - taken[below]) / (above - below)
        if not on_every_rank(taken[above] + (rows - above) * growth <= free):
            return False
        taken[rows] = _peak_of(lambda: probe(rows)) - start
        return on_every_rank(taken[rows] <= free)

    fitting, too_many = 1, most + 1
    while fitting < most and too_many > most:
        rows = min(2 * fitting, most)
        fitting, too_many = (rows, too_many) if fits(rows) else (fitting, rows)
    while too_many - fitting > 1 + fitting // _PRECISION:
        rows = (fitting + too_many) // 2
        fitting, too_many = (rows, too_many) if fits(rows) else (fitting, rows)
    return fitting


def unallocated_optimizer_state(engine: Engine) -> int:
    """Bytes on this device that the first step will allocate for AdamW's two moments, in fp32."""
    optimizer = engine.basic_optimizer
    return sum(
        2 * 4 * parameter.numel()
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.device.type == device().type and "exp_avg" not in optimizer.state.get(parameter, {})
    )


def _peak_of(work: Callable[[], None]) -> int:
    """The most bytes that this rank has allocated at any time while `work` runs."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    # Reset the peak. If the kernel refuses, it is the peak since the start of the process, which is on the safe side.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    work()
    return memory_status("VmHWM")


def _allocated_bytes() -> int:
    return torch.cuda.memory_allocated() if on_gpu() else memory_status("VmRSS")


def memory_status(name: str) -> int:
    """The bytes in line `name` of /proc/self/status, such as VmRSS, the resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
