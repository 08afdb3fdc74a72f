"""The DeepSpeed configuration and the engines made from it.

Every engine runs with `managed_gradient_accumulation` off: a step is any number of `backward` calls followed by
one `step`. So an optimizer step may hold as many micro-batches as its rows need, and the loss carries its own
normalisation (see `accumulate`); whether it is made at all, `common.training.atomic_step` decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from common.runtime.distributed import device, on_gpu, world_size
from common.training.gradients import GradientSize
from common.training.optim import Untrained, build_optimizer, build_scheduler, parameter_groups, say_shortened_warmup

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_dtype(name: str) -> torch.dtype:
    """`auto` is bf16 on a GPU that computes in it, fp16 on another, and fp32 on a CPU.

    Raises:
        UserError: fp16 without a GPU; DeepSpeed cannot train it there.
    """
    if name == "auto":
        if not on_gpu():
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "fp16" and not on_gpu():
        raise UserError("--dtype fp16 needs a GPU; on a CPU use --dtype fp32 or --dtype bf16")
    return DTYPES[name]


def check_engine_options(config) -> None:
    """Raises UserError if `--dtype` or `--deepspeed_config` cannot be used, before anything is loaded."""
    resolve_dtype(config.dtype)
    if config.deepspeed_config:
        read_override(config.deepspeed_config)


@dataclass(frozen=True)
class EngineSettings:
    """What decides how DeepSpeed holds one model.

    Attributes:
        zero_stage: 0, 1, 2 or 3.
        dtype: of the weights in forward and backward; the optimizer keeps fp32 masters.
        micro_batch: rows per rank and forward pass, for DeepSpeed's throughput figures only.
        offload: optimizer state (ZeRO 1-3) and parameters (ZeRO 3) in CPU memory.
        max_grad_norm: gradient clipping by global norm; 0 turns it off.
        override: path of a JSON file merged over the generated configuration.
    """

    zero_stage: int
    dtype: torch.dtype
    micro_batch: int
    offload: bool = False
    max_grad_norm: float = 0.0
    override: str | None = None

    @classmethod
    def from_config(cls, config) -> EngineSettings:
        """Those of a step with one model."""
        return cls(
            config.zero_stage,
            resolve_dtype(config.dtype),
            config.per_device_train_batch_size,
            config.offload,
            config.max_grad_norm,
            config.deepspeed_config,
        )


@dataclass(frozen=True)
class OptimizerSettings:
    """What decides how one model learns; learning rates per optimizer step, see `common.training.optim`."""

    learning_rate: float
    lora_learning_rate: float
    weight_decay: float
    scheduler: str
    warmup_steps: int
    total_steps: int

    @classmethod
    def from_config(cls, config, total_steps: int) -> OptimizerSettings:
        """Those of a step with one model."""
        say_shortened_warmup(config, total_steps)
        return cls(
            config.learning_rate,
            config.lora_learning_rate,
            config.weight_decay,
            config.lr_scheduler_type,
            config.num_warmup_steps,
            total_steps,
        )


def deepspeed_config(settings: EngineSettings, trainable: bool = True) -> dict:
    """The JSON configuration of one engine, as a dict.

    A frozen model may only be held whole (stage 0) or partitioned (stage 3); stages 1 and 2 partition what a
    frozen model does not have. fp16 trains at stage 1 at least: DeepSpeed's optimizer for stage 0 takes gradients for
    scaled that `engine.backward` has not scaled.
    """
    stage = settings.zero_stage
    if not trainable and stage != 3:
        stage = 0
    if trainable and settings.dtype == torch.float16:
        stage = max(stage, 1)
    zero: dict = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        # Small parameters stay whole: gathering them costs more than it saves.
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
        "bf16": {"enabled": settings.dtype == torch.bfloat16},
        "fp16": {"enabled": settings.dtype == torch.float16, "initial_scale_power": 16},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    return merge(config, read_override(settings.override)) if settings.override else config


# What the programs decide themselves, and the flag that decides it.
_DECIDED_BY = {
    "train_batch_size": "--per_device_train_batch_size",
    "fp16.enabled": "--dtype",
    "bf16.enabled": "--dtype",
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_clipping": "--max_grad_norm",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "optimizer": "--learning_rate",
    "managed_gradient_accumulation": "--gradient_accumulation_steps",
    "scheduler": "--lr_scheduler_type",
    "zero_optimization.stage": "--zero_stage",
}


def read_override(path: str) -> dict:
    """The JSON object of `--deepspeed_config`, to be laid over the generated configuration.

    Raises:
        UserError: it cannot be read, or it sets what another flag decides.
    """
    try:
        override = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--deepspeed_config {path}: is not valid JSON: {error}") from None
    if not isinstance(override, dict):
        raise UserError(f"--deepspeed_config {path}: must hold one JSON object, {{...}}")
    for name, value in _flat(override):
        if name in _DECIDED_BY:
            raise UserError(
                f"--deepspeed_config {path}: leave out {name}; {_DECIDED_BY[name]} decides that (in step 3 "
                "the flags of actor and critic)"
            )
        if value == "auto":
            raise UserError(f'--deepspeed_config {path}: {name} is "auto": write a value, or leave it out')
    return override


def _flat(section: dict, prefix: str = ""):
    """(dotted name, value) of everything in nested sections, the sections themselves included."""
    for key, value in section.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def merge(base: dict, override: dict) -> dict:
    """`override` laid over `base`, section by section."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def training_engine(model: nn.Module, settings: EngineSettings, optimizer: OptimizerSettings):
    """A DeepSpeed engine that trains the parameters of `model` that require gradients, and watches these."""
    import deepspeed

    groups = parameter_groups(model, optimizer.learning_rate, optimizer.weight_decay, optimizer.lora_learning_rate)
    config = deepspeed_config(settings)
    adamw = build_optimizer(groups, "offload_optimizer" in config["zero_optimization"])
    schedule = build_scheduler(adamw, optimizer.scheduler, optimizer.warmup_steps, optimizer.total_steps)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, lr_scheduler=schedule, config=config)
    _forget_start_up_step(adamw)
    engine.gradients = GradientSize(model)
    engine.untrained = Untrained(model)
    engine.train()  # transformers loads models in evaluation mode, without dropout
    return engine


def frozen_engine(model: nn.Module, settings: EngineSettings):
    """A DeepSpeed engine for a model that is only read: no gradient, no optimizer; partitioned under ZeRO-3."""
    import deepspeed

    model.requires_grad_(False).eval()
    engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config(settings, trainable=False))
    engine.eval()
    return engine


def accumulate(engine, micro_batches: Iterable, loss_of: Callable) -> torch.Tensor:
    """Add the gradients of micro-batches to those of the optimizer step in hand; `engine.step()` makes it.

    Args:
        micro_batches: this rank's micro-batches; every rank must have the same number of them.
        loss_of: maps a micro-batch to this rank's share of the loss: its sum over tokens or pairs divided by
            their number in the whole optimizer step, over all ranks and micro-batches. The shares of all ranks
            and micro-batches then add up to the mean, whatever their sizes.

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


def gradient_norm(engine) -> float | None:
    """Global gradient norm of the last step made, before clipping; None where DeepSpeed keeps none (fp32, ZeRO 0)."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def _forget_start_up_step(optimizer: torch.optim.Optimizer) -> None:
    """Undo the step with zero gradients that some of DeepSpeed's optimizers take to allocate their state.

    It advances Adam's step counter, so that bias correction makes the first real updates too small (bf16 at
    stage 0: 0.735 of the other stages').
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].zero_()
        elif "step" in state:
            state["step"] = 0
