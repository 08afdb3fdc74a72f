"""Generates the configuration of DeepSpeed, and creates engines with it.

Every engine runs with `managed_gradient_accumulation` off: an optimizer step is any number of `backward` calls and one
`step`. So it may have as many micro-batches as its rows need, and the loss carries its own normalisation (see
`accumulate`). `common.training.atomic_step` decides whether the step is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from common.config.groups import QUANTIZATIONS, OneModelConfig, RunOptions, ScheduleOptions, TrainedModelOptions
from common.config.parser import Config, options
from common.errors import InputError, named_by
from common.models.engine import Engine
from common.models.quantization import check_quantization
from common.runtime.distributed import device, on_gpu, world_size
from common.training.gradients import GradientSize
from common.training.optim import (
    EPSILON,
    WeightChanges,
    build_optimizer,
    build_scheduler,
    parameter_groups,
    say_shortened_warmup,
)

MicroBatch = TypeVar("MicroBatch")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_dtype(name: str) -> torch.dtype:
    """The number format for --dtype: `auto` is bf16 on a GPU that supports it, fp16 on other GPUs, fp32 on a CPU.

    Raises:
        InputError: `name` is fp16 and there is no GPU. DeepSpeed cannot train in fp16 on a CPU.
    """
    if name == "auto":
        if not on_gpu():
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "fp16" and not on_gpu():
        raise InputError("fp16", "it needs a GPU; on a CPU use fp32 or bf16")
    return DTYPES[name]


def check_engine_options(config: RunOptions) -> None:
    """Raise UserError if --dtype, --deepspeed_config or weights of few bits cannot be used.

    Programs call it before they load anything.
    """
    with named_by("--dtype"):
        dtype = resolve_dtype(config.dtype)
    for name, meta in options(type(config)).items():
        if meta.choices == QUANTIZATIONS:
            with named_by(f"--{name}"):
                check_quantization(getattr(config, name), dtype)
    if config.deepspeed_config:
        with named_by("--deepspeed_config"):
            check_override(config.deepspeed_config, type(config))


class TrainedEngine(Engine, Protocol):
    """An engine that trains, as `training_engine` makes it.

    Attributes:
        gradients: the size of the gradients since the last step, on this rank.
        weight_changes: tells whether any weight has changed since the engine was made.
    """

    gradients: GradientSize
    weight_changes: WeightChanges


@dataclass(frozen=True)
class EngineSettings:
    """How DeepSpeed stores and steps one model.

    Attributes:
        zero_stage: 0, 1, 2 or 3.
        dtype: of the weights in forward and backward; the optimizer keeps fp32 masters. A quantised model computes in
            it, but all its other weights are fp32.
        micro_batch: rows per rank and forward pass; DeepSpeed uses it only to report its throughput.
        offload: keep optimizer state (ZeRO 1-3) and parameters (ZeRO 3) in CPU memory.
        max_grad_norm: clip gradients to this global norm; 0 turns it off.
        override: path of a JSON file that is merged over the generated configuration.
        quantize: how the linear layers of the model are held: none, nf4 or int8.
    """

    zero_stage: int
    dtype: torch.dtype
    micro_batch: int
    offload: bool = False
    max_grad_norm: float = 0.0
    override: str | None = None
    quantize: str = "none"

    @classmethod
    def from_config(cls, config: OneModelConfig) -> EngineSettings:
        """The settings of a step that trains one model."""
        return cls(
            config.zero_stage,
            resolve_dtype(config.dtype),
            config.per_device_train_batch_size,
            config.offload,
            config.max_grad_norm,
            config.deepspeed_config,
            config.quantize,
        )


@dataclass(frozen=True)
class OptimizerSettings:
    """How one model learns.

    Attributes:
        learning_rate: the peak rate of all parameters except those of adapters.
        lora_learning_rate: the peak rate of adapters.
        weight_decay: of AdamW.
        scheduler: one of `common.config.groups.SCHEDULES`.
        warmup_steps, total_steps: optimizer steps.
        epsilon: of AdamW.
    """

    learning_rate: float
    lora_learning_rate: float
    weight_decay: float
    scheduler: str
    warmup_steps: int
    total_steps: int
    epsilon: float = EPSILON

    @classmethod
    def from_config(cls, config: OneModelConfig, total_steps: int) -> OptimizerSettings:
        """The settings of a step that trains one model; a warm-up that does not fit into the run is reported."""
        say_shortened_warmup(config, total_steps)
        return cls.for_model(config.trained, config, total_steps)

    @classmethod
    def for_model(cls, model: TrainedModelOptions, schedule: ScheduleOptions, total_steps: int) -> OptimizerSettings:
        """The settings of one of the models that a step trains."""
        return cls(
            model.learning_rate,
            model.lora_learning_rate,
            model.weight_decay,
            schedule.lr_scheduler_type,
            schedule.num_warmup_steps,
            total_steps,
            model.adam_epsilon,
        )


def deepspeed_config(settings: EngineSettings, trainable: bool = True) -> dict[str, Any]:
    """The JSON configuration of one engine, as a dict.

    A frozen model is replicated (stage 0) or partitioned (stage 3); stages 1 and 2 partition optimizer state and
    gradients, which it does not have. fp16 trains at stage 1 or above: at stage 0 DeepSpeed's optimizer divides the
    gradients by the loss scale, although `engine.backward` has not multiplied the loss by it.
    """
    stage, dtype = settings.zero_stage, settings.dtype if settings.quantize == "none" else torch.float32
    if not trainable and stage != 3:
        stage = 0
    if trainable and dtype == torch.float16:
        stage = max(stage, 1)
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        # Small parameters are not partitioned: gathering them costs more time than it saves memory.
        zero.update(stage3_param_persistence_threshold=10_000, stage3_gather_16bit_weights_on_model_save=True)
    if settings.offload:
        if trainable and stage > 0:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu()}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu()}
    config = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16, "initial_scale_power": 16},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    return merge(config, read_override(settings.override)) if settings.override else config


def read_override(path: str) -> dict[str, Any]:
    """Read the JSON object that is merged over the generated configuration.

    Raises:
        InputError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        override = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(path, f"is not valid JSON: {error}") from None
    if not isinstance(override, dict):
        raise InputError(path, "must hold one JSON object, {...}")
    return override


def check_override(path: str, config_class: type[Config]) -> None:
    """Raise InputError if the file cannot be read, or sets a key that an option of the program decides.

    Args:
        config_class: the options of the program; each declares its `deepspeed_keys`.
    """
    deciding: dict[str, list[str]] = {}
    for name, meta in options(config_class).items():
        for key in meta.deepspeed_keys:
            deciding.setdefault(key, []).append(f"--{name}")
    for key, value in _flat(read_override(path)):
        if key in deciding:
            verb = "decides" if len(deciding[key]) == 1 else "decide"
            raise InputError(path, f"leave out {key}; {' and '.join(deciding[key])} {verb} that")
        if value == "auto":
            raise InputError(path, f'{key} is "auto": write a value, or leave it out')


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every entry of nested sections, the sections themselves included."""
    for key, value in section.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`override` laid over `base`, section by section."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def training_engine(model: nn.Module, settings: EngineSettings, optimizer: OptimizerSettings) -> TrainedEngine:
    """A DeepSpeed engine that trains the parameters of `model` which require gradients."""
    import deepspeed

    groups = parameter_groups(model, optimizer.learning_rate, optimizer.weight_decay, optimizer.lora_learning_rate)
    config = deepspeed_config(settings)
    adamw = build_optimizer(groups, optimizer.epsilon, "offload_optimizer" in config["zero_optimization"])
    schedule = build_scheduler(adamw, optimizer.scheduler, optimizer.warmup_steps, optimizer.total_steps)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, lr_scheduler=schedule, config=config)
    _reset_step_counter(adamw)
    engine.gradients = GradientSize(model)
    engine.weight_changes = WeightChanges(model)
    engine.train()  # transformers loads models in evaluation mode, without dropout
    return engine


def frozen_engine(model: nn.Module, settings: EngineSettings) -> Engine:
    """A DeepSpeed engine for a model that is not trained: no gradients, no optimizer; partitioned under ZeRO-3."""
    import deepspeed

    model.requires_grad_(False).eval()
    engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config(settings, trainable=False))
    engine.eval()
    return engine


def accumulate(
    engine: Engine, micro_batches: Iterable[MicroBatch], loss_of: Callable[[MicroBatch], torch.Tensor]
) -> torch.Tensor:
    """Add the gradients of micro-batches to those of the current optimizer step, which `engine.step()` makes.

    Args:
        micro_batches: this rank's micro-batches; every rank must have the same number of them.
        loss_of: maps a micro-batch to this rank's share of the loss, a scalar: its sum over tokens or pairs, divided
            by their number in the whole optimizer step, over all ranks and micro-batches. So the shares of all ranks
            and micro-batches add up to the mean, whatever their sizes.

    Returns:
        This rank's share of the loss, a scalar without a gradient.
    """
    total = torch.zeros((), device=device())
    for micro_batch in micro_batches:
        loss = loss_of(micro_batch)
        # DeepSpeed averages gradients over ranks; the loss carries all other scaling itself.
        engine.backward(loss * world_size(), scale_wrt_gas=False)
        total += loss.detach()
    return total


def gradient_norm(engine: Engine) -> float | None:
    """Global norm of the last step's gradients, before clipping; None in fp32 at ZeRO 0: DeepSpeed has none."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _reset_step_counter(optimizer: torch.optim.Optimizer) -> None:
    """Undo the step with zero gradients that some of DeepSpeed's optimizers take to allocate their state.

    It advances Adam's step counter, so that bias correction makes the first real updates too small (bf16 at
    stage 0: 0.735 of the other stages').
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].zero_()
        elif "step" in state:
            state["step"] = 0
