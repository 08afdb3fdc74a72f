"""Creates AdamW over groups of parameters, and its learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from common.config.groups import ScheduleOptions
from common.errors import InputError
from common.runtime.distributed import on_every_rank, on_gpu, say
from common.training.learning_rate import fraction_of_peak

BETAS = (0.9, 0.95)  # of AdamW, as in the training of InstructGPT and DeepSpeed-Chat
EPSILON = 1e-8  # of AdamW, unless an option says otherwise


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, lora_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters into AdamW groups.

    One-dimensional parameters (biases, norms) are not decayed. LoRA matrices are decayed like any matrix and
    take `lora_learning_rate`; everything else takes `learning_rate`.

    Returns:
        Non-empty groups, each with params, lr and weight_decay, in a fixed order.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = lora_learning_rate if lora_learning_rate is not None and "lora_" in name else learning_rate
        # Under ZeRO-3 a partitioned parameter shows one empty dimension; its true shape is ds_shape.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        groups.setdefault((lr, weight_decay if dimensions > 1 else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in sorted(groups.items(), reverse=True)
    ]


def build_optimizer(groups: list[dict[str, Any]], epsilon: float, offload: bool) -> torch.optim.Optimizer:
    """AdamW: torch's, fused on a GPU; DeepSpeed's CPU kernel where the optimizer is offloaded from one."""
    if offload and on_gpu():
        return cpu_adam(groups, epsilon)
    return torch.optim.AdamW(groups, betas=BETAS, eps=epsilon, fused=on_gpu())


class CannotCompile(InputError):
    """A kernel that is not compiled yet, and that cannot be compiled here."""


def cpu_adam(groups: list[dict[str, Any]], epsilon: float = EPSILON) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for CPUs.

    Raises:
        CannotCompile: its kernel is not compiled yet, and no compiler is installed.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(groups, betas=BETAS, eps=epsilon, adamw_mode=True)
    except RuntimeError as error:
        raise CannotCompile(
            "DeepSpeed's optimizer for CPUs",
            "it cannot be compiled here: install a C++ compiler and ninja (on Debian and Ubuntu: apt install g++ "
            f"ninja-build), or leave the option out ({error.__cause__ or error})",
        ) from error


def say_shortened_warmup(config: ScheduleOptions, total_steps: int) -> None:
    """Print a note if the run is shorter than its warm-up, as it is in step 3 by default with little data."""
    if config.num_warmup_steps > total_steps and config.lr_scheduler_type != "constant":
        say(
            f"note: --num_warmup_steps {config.num_warmup_steps} is shortened to the {total_steps} optimizer "
            f"step{'s' if total_steps > 1 else ''} that this run has, so the learning rate rises to its end"
        )


def build_scheduler(optimizer: torch.optim.Optimizer, name: str, warmup_steps: int, total_steps: int) -> LambdaLR:
    """The learning-rate schedule `name` over `total_steps` optimizer steps."""
    return LambdaLR(optimizer, lambda step: fraction_of_peak(name, step, warmup_steps, total_steps))


class WeightChanges:
    """Detects whether training has changed any weight of a model, by checksums of all bits.

    It must be created before the first step, and before a checkpoint is loaded: a resumed run starts from the same
    weights.
    """

    def __init__(self, model: nn.Module):
        self._model, self._before = model, _checksums(model)

    def none(self) -> bool:
        """Whether no weight has changed on any rank. All ranks must call it."""
        return on_every_rank(_checksums(self._model) == self._before)


@torch.no_grad()
def _checksums(model: nn.Module) -> list[int]:
    """A checksum of the bits of each trainable parameter; under ZeRO-3 of this rank's part of it."""
    sums = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = getattr(parameter, "ds_tensor", parameter).detach()
            sums.append(values.view(torch.int32 if values.element_size() == 4 else torch.int16).sum(dtype=torch.int64))
    return torch.stack(sums).tolist() if sums else []
