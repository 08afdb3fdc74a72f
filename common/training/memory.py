"""Memory: what fits is measured before training, and what did not fit is said in one line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from common.errors import TrainingFailure
from common.runtime.distributed import device, memory_available, on_every_rank, on_gpu, rank, say

# Of what is free: the rest is for fragments, for the optimizer's own buffers, and for other programs.
USABLE = 0.8
# Bisecting ends where the answer is known to one part in this.
_PRECISION = 8

_CUT = "let --auto_micro_batch choose, or lower --max_tokens_per_micro_batch or --per_device_{}_batch_size"
_HOLD = "add --{0}gradient_checkpointing, raise --{0}zero_stage, or add --offload"
_HELPS = {  # by words of the phase
    "generate": "lower --per_device_generation_batch_size, or add --release_inference_cache",
    "log_probs": _CUT.format("training"),
    "score": _CUT.format("training"),
    "actor_update": f"{_CUT.format('training')}, {_HOLD.format('actor_')}",
    "critic_update": f"{_CUT.format('training')}, {_HOLD.format('critic_')}",
    "training step": f"{_CUT.format('train')}, {_HOLD.format('')}",
    "evaluation": "lower --per_device_eval_batch_size, in step 3 --per_device_generation_batch_size",
}
_HELPS_ANYWHERE = (
    "use shorter rows (--max_seq_len, in step 3 --max_prompt_seq_len and --max_answer_seq_len), or hold "
    "less of the models on each rank: --zero_stage 3 (in step 3 of actor and critic), --offload, LoRA"
)


@contextlib.contextmanager
def named_when_out_of_memory(phase: str) -> Iterator[None]:
    """Within the context, memory that is refused ends the run in a line with the phase, the size, and what helps.

    Raises:
        TrainingFailure: on the ranks that ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        size = size_asked(error)
        if size is None:
            raise
        helps = next((helps for words, helps in _HELPS.items() if words in phase), _HELPS_ANYWHERE)
        raise TrainingFailure(
            f"out of memory on rank {rank()} in {phase}, which asked for {size} more: {helps}"
        ) from None


def size_asked(error: Exception) -> str | None:
    """The size of the allocation that failed, in words; None if the error is another one."""
    found = re.search(r"(?:tried to allocate|unable to allocate) ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
    if found:
        return found[1]
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "std::bad_alloc" in str(error)
    return "an unknown amount" if known else None


def fit_micro_batches(
    config, remembered: int | None, engines: Sequence, probe: Callable[[int], None], longest: int, rows: int
):
    """The config with --max_tokens_per_micro_batch as --auto_micro_batch finds it; unchanged where that is off.

    The optimizer's steps keep their rows, so their loss and gradients are the same. Weights, gradients and random
    state are afterwards what they were. All ranks must call it.

    Args:
        remembered: what an interrupted run found: rounding depends on it, so a resumed one measures nothing.
        engines: those that train.
        probe: forward and backward of so many of the longest rows, all of it dropped.
        longest: tokens of such a row.
        rows: that one optimizer step has on a rank; more are never needed together.
    """
    if not config.auto_micro_batch:
        return config
    if not remembered:
        free = USABLE * memory_available() - sum(map(optimizer_state_to_come, engines))
        with (
            torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu() else []),
            named_when_out_of_memory("the probe of --auto_micro_batch"),
        ):
            fitting = most_that_fit(probe, rows, free)
        remembered = fitting * longest
        say(
            f"--auto_micro_batch: {fitting} of the longest rows fit together, so --max_tokens_per_micro_batch is "
            f"{remembered}"
        )
    return replace(config, auto_micro_batch=False, max_tokens_per_micro_batch=remembered)


def most_that_fit(probe: Callable[[int], None], most: int, free: float) -> int:
    """The largest number of rows, 1 at least, whose probe takes no more than `free` bytes on any rank.

    A number is tried only where the growth of the two before it lets every rank expect that it fits: a rank that ran
    out of memory in the middle of a pass would leave the others waiting for it.
    """
    start = _bytes_taken()
    taken = {0: 0, 1: _peak_of(lambda: probe(1)) - start}  # a single row is tried anyway: without it there is no run

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


def optimizer_state_to_come(engine) -> int:
    """Bytes that the first step will take on this device for moments in fp32 which are not there yet."""
    optimizer = engine.basic_optimizer
    return sum(
        2 * 4 * parameter.numel()
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.device.type == device().type and "exp_avg" not in optimizer.state.get(parameter, {})
    )


def _peak_of(work: Callable[[], None]) -> int:
    """Bytes that this rank holds at most while it works."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):  # where the kernel refuses, the peak is that since the start: too careful
        Path("/proc/self/clear_refs").write_text("5")
    work()
    return memory_status("VmHWM")


def _bytes_taken() -> int:
    return torch.cuda.memory_allocated() if on_gpu() else memory_status("VmRSS")


def memory_status(name: str) -> int:
    """Bytes that the kernel says this process has of `name`, a line of /proc/self/status such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
