"""Variants of the same work in turns, and what each of them takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from common.models.engine import Engine
from common.models.quantization import quantized_layers
from common.runtime.distributed import barrier, gather_objects, is_main, on_gpu, world_size
from common.training.memory import memory_status
from common.training.timing import now

MIB = 2**20
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Outcome(Generic[ResultT]):
    """What one run of a variant did on this rank.

    Attributes:
        samples: rows, pairs or responses.
        real_tokens, padded_tokens: positions of the model's passes that hold data, and all of them.
        result: what the variants must agree on.
        new_tokens: tokens written, in a rollout.
        phases: seconds of the parts of the run; what they leave over is reported as `other`.
        extra: further figures of this variant.
    """

    samples: int
    real_tokens: int
    padded_tokens: int
    result: ResultT
    new_tokens: int = 0
    phases: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run(Generic[ResultT]):
    outcome: Outcome[ResultT]
    seconds: float
    device_bytes: int
    resident_bytes: int


def compare(
    variants: Mapping[str, Callable[[], Outcome[ResultT]]],
    agree: Callable[[ResultT, ResultT], Mapping[str, float]],
    *,
    rounds: int,
    steps: int,
    about: Mapping[str, object],
) -> None:
    """Run the variants in turns and print a JSON line for each: A B B A in every round, after a run of each unmeasured.

    Args:
        variants: by name; the first is the one that the others are compared with.
        agree: given the first variant's result and another's, raises AssertionError unless they agree; returns figures
            of how well they do.
        steps: optimizer steps (iterations, rollouts) in a run, that its time is divided by.
        about: what was asked for; part of every line.
    """
    runs: dict[str, list[_Run[ResultT]]] = {name: [] for name in variants}
    agreement: dict[str, Mapping[str, float]] = {name: {} for name in variants}
    first, *others = variants
    results = {name: _measured(variant).outcome.result for name, variant in variants.items()}
    for name in others:
        agreement[name] = agree(results[first], results[name])
    for _ in range(rounds):
        for name in (*variants, *reversed(list(variants))):
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
    """What the figures were taken on."""
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


LOAD_AT_START = round(os.getloadavg()[0], 2)  # what else kept the machine busy; figures need a quiet one


@contextlib.contextmanager
def counted_positions(module: nn.Module, *, training: bool) -> Iterator[list[int]]:
    """A list that gets the size of every batch of ids that `module` is given with gradients on, or with them off."""
    sizes: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() == training:
            sizes.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel())

    hook = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


def assert_close(first: Mapping[str, float | None], other: Mapping[str, float | None], tolerance: float) -> None:
    """Raises AssertionError where figures differ by more than `tolerance` of 1 or, if that is more, of the figure."""
    for name, value in first.items():
        found = other[name]
        if value is not None and found is not None and not abs(value - found) <= tolerance * max(1.0, abs(value)):
            raise AssertionError(f"the variants disagree: {name} is {value:.6g} and {found:.6g}")


def tolerance(dtype: torch.dtype) -> float:
    """By how much losses and gradient norms may differ that are summed in another order."""
    return 1e-4 if dtype == torch.float32 else 5e-2


def weights_mib(engines: Iterable[Engine | None]) -> float:
    """What the engines' weights take on this rank, those that several share counted once, and scales of quantised ones
    included."""
    weights = [
        getattr(parameter, "ds_tensor", parameter)
        for engine in engines
        for parameter in (engine.module.parameters() if engine is not None else ())
    ]
    scales = [
        tensor
        for engine in engines
        for layer in (quantized_layers(engine.module) if engine is not None else ())
        for tensor in layer.scale_tensors()
    ]
    return _mib(_storages([*weights, *scales]))


def optimizer_mib(engine: Engine) -> float:
    """What the optimizer of torch holds on this rank besides the weights: moments, and fp32 copies of weights."""
    optimizer = engine.basic_optimizer
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    of_weights = _storages(engine.module.parameters())
    return _mib({place: size for place, size in _storages(held).items() if place not in of_weights})


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of each piece of memory that the tensors lie in, by its address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _mib(storages: Mapping[int, int]) -> float:
    return sum(storages.values()) / MIB


def _measured(variant: Callable[[], Outcome[ResultT]]) -> _Run[ResultT]:
    _forget_peaks()
    barrier()
    start = now()
    outcome = variant()
    stop = now()
    barrier()
    resident = memory_status("VmHWM")
    held = torch.cuda.max_memory_allocated() if on_gpu() else 0
    counts = outcome.samples, outcome.real_tokens, outcome.padded_tokens, outcome.new_tokens
    ranks = gather_objects((counts, stop - start, held, resident))
    samples, real_tokens, padded_tokens, new_tokens = map(sum, zip(*(counts for counts, *_ in ranks)))
    return _Run(
        replace(outcome, samples=samples, real_tokens=real_tokens, padded_tokens=padded_tokens, new_tokens=new_tokens),
        max(seconds for _, seconds, _, _ in ranks),
        max(held for _, _, held, _ in ranks),
        max(resident for _, _, _, resident in ranks),
    )


def _figures(runs: Sequence[_Run[ResultT]], steps: int) -> dict[str, object]:
    seconds = median(run.seconds for run in runs)
    outcome = runs[0].outcome
    figures: dict[str, float] = {
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
    rounded: dict[str, object] = {"runs": len(runs)}
    rounded |= {name: float(f"{value:.4g}") for name, value in figures.items()}
    if outcome.phases:
        phases = [{**run.outcome.phases, "other": run.seconds - sum(run.outcome.phases.values())} for run in runs]
        rounded["phase_seconds"] = {
            name: float(f"{median(run[name] for run in phases) / steps:.4g}") for name in phases[0]
        }
    return rounded


def _forget_peaks() -> None:
    """So that a run's peaks are its own: what the last one freed goes back, and the counters start again."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError):  # another libc than GNU's; a kernel that forbids it
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
