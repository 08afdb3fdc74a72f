"""Runs variants of the same work in turns, and measures the time and memory of each."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import nn

from common.runtime.distributed import barrier, gather_objects, is_main, on_gpu, world_size
from common.training.memory import memory_status
from common.training.timing import now

MIB = 2**20


@dataclass(frozen=True)
class Outcome:
    """The result of one run of a variant on this rank.

    Attributes:
        samples: rows, pairs or responses.
        real_tokens, padded_tokens: positions in the model's passes without and with padding.
        result: the value on which the variants must agree.
        new_tokens: generated tokens, in a rollout.
        phases: seconds of the parts of the run; the rest of the time is reported as `other`.
        extra: further figures of this variant.
    """

    samples: int
    real_tokens: int
    padded_tokens: int
    result: object
    new_tokens: int = 0
    phases: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    outcome: Outcome
    seconds: float
    device_bytes: int
    resident_bytes: int


def compare(
    variants: Mapping[str, Callable[[], Outcome]],
    agree: Callable[[object, object], dict],
    *,
    rounds: int,
    steps: int,
    about: Mapping[str, object],
) -> None:
    """Run the variants in turns, A B B A in every round, and print a JSON line for each.

    Each variant first runs once without being measured.

    Args:
        variants: by name; the first is the one that the others are compared with.
        agree: is called with the first variant's result and another's. Raises AssertionError unless they agree; returns
            figures that say how well they agree.
        steps: optimizer steps (iterations, rollouts) in a run; its time is divided by them.
        about: the settings; part of every line.
    """
    runs: dict[str, list[_Run]] = {name: [] for name in variants}
    agreement: dict[str, dict] = {name: {} for name in variants}
    first, *others = variants
    results = {name: _measured(variant).outcome.result for name, variant in variants.items()}
    for name in others:
        agreement[name] = agree(results[first], results[name])
    for _ in range(rounds):
        for name in (*variants, *reversed(variants)):
            run = _measured(variants[name])
            agree(results[first], run.outcome.result)
            runs[name].append(run)
    base = median(run.seconds for run in runs[first])
    for name in variants:
        figures = _figures(runs[name], steps)
        if name != first:
            figures |= {f"times_faster_than_{first}": round(base / median(run.seconds for run in runs[name]), 3)}
        say_line({**about, "variant": name, **figures, **agreement[name]})


def say_line(line: Mapping[str, object]) -> None:
    """Print a JSON line on rank 0, on a line of its own."""
    if is_main():
        print(json.dumps({**line, **machine()}), flush=True)


def machine() -> dict[str, object]:
    """The machine that ran the benchmark."""
    if on_gpu():
        name = torch.cuda.get_device_name()
    else:
        models = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else platform.machine()
    return {
        "device": name,
        "ranks": world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_at_start": LOAD_AT_START,
    }


LOAD_AT_START = round(os.getloadavg()[0], 2)  # load by other programs; figures are valid only on an idle machine


@contextlib.contextmanager
def counted_positions(module: nn.Module, *, training: bool) -> Iterator[list[int]]:
    """Within the context, a list to which the size of every batch of ids is appended.

    Args:
        module: the model whose calls are counted.
        training: count calls with gradients enabled, or those with gradients disabled.
    """
    sizes: list[int] = []

    def count(_, args, kwargs) -> None:
        if torch.is_grad_enabled() == training:
            sizes.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel())

    hook = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


def assert_close(first: Mapping[str, float | None], other: Mapping[str, float | None], tolerance: float) -> None:
    """Raise AssertionError if figures differ by more than `tolerance` times the larger of 1 and the figure."""
    for name, value in first.items():
        actual = other[name]
        if value is not None and actual is not None and not abs(value - actual) <= tolerance * max(1.0, abs(value)):
            raise AssertionError(f"the variants disagree: {name} is {value:.6g} and {actual:.6g}")


def tolerance(dtype: torch.dtype) -> float:
    """The tolerance for losses and gradient norms that are summed in another order."""
    return 1e-4 if dtype == torch.float32 else 5e-2


def _measured(variant: Callable[[], Outcome]) -> _Run:
    _reset_peaks()
    barrier()
    start = now()
    outcome = variant()
    stop = now()
    barrier()
    resident_bytes = memory_status("VmHWM")
    device_bytes = torch.cuda.max_memory_allocated() if on_gpu() else 0
    ranks = gather_objects(
        (
            outcome.samples,
            outcome.real_tokens,
            outcome.padded_tokens,
            outcome.new_tokens,
            stop - start,
            device_bytes,
            resident_bytes,
        )
    )
    totals = [sum(rank[column] for rank in ranks) for column in range(4)]
    seconds, device_bytes, resident_bytes = (max(rank[column] for rank in ranks) for column in (4, 5, 6))
    samples, real_tokens, padded_tokens, new_tokens = totals
    return _Run(
        replace(outcome, samples=samples, real_tokens=real_tokens, padded_tokens=padded_tokens, new_tokens=new_tokens),
        seconds,
        device_bytes,
        resident_bytes,
    )


def _figures(runs: Sequence[_Run], steps: int) -> dict[str, object]:
    seconds = median(run.seconds for run in runs)
    outcome = runs[0].outcome
    figures: dict[str, object] = {
        "step_seconds": seconds / steps,
        "fastest_step_seconds": min(run.seconds for run in runs) / steps,
        "samples_per_second": outcome.samples / seconds,
        "real_tokens_per_second": outcome.real_tokens / seconds,
        "padded_tokens_per_second": outcome.padded_tokens / seconds,
        "padding_share": 1 - outcome.real_tokens / outcome.padded_tokens,
        "peak_resident_mib": max(run.resident_bytes for run in runs) / MIB,
        **outcome.extra,
    }
    if outcome.new_tokens:
        figures["new_tokens_per_second"] = outcome.new_tokens / seconds
    if on_gpu():
        figures["peak_device_mib"] = max(run.device_bytes for run in runs) / MIB
    rounded = {"runs": len(runs)} | {name: float(f"{value:.4g}") for name, value in figures.items()}
    if outcome.phases:
        phases = [{**run.outcome.phases, "other": run.seconds - sum(run.outcome.phases.values())} for run in runs]
        rounded["phase_seconds"] = {
            name: float(f"{median(run[name] for run in phases) / steps:.4g}") for name in phases[0]
        }
    return rounded


def _reset_peaks() -> None:
    """Return freed memory to the system and reset the counters, so that a run's peaks do not include earlier runs."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):  # another libc than GNU's; a kernel that forbids it
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
