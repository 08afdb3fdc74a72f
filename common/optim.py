"""Optimizers and learning-rate schedules: AdamW over named groups of parameters."""
from __future__ import annotations

import torch
from torch import nn

from common.distributed import on_gpu
from common.errors import UserError

BETAS = (0.9, 0.95)  # the betas of InstructGPT's and DeepSpeed-Chat's training


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float,
                     lora_learning_rate: float | None = None) -> list[dict]:
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
    return [{"params": parameters, "lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in sorted(groups.items(), reverse=True)]


def build_optimizer(groups: list[dict], offload: bool) -> torch.optim.Optimizer:
    """AdamW: torch's, fused on a GPU; DeepSpeed's CPU kernel where the optimizer is offloaded from one."""
    if offload and on_gpu():
        return cpu_adam(groups)
    return torch.optim.AdamW(groups, betas=BETAS, fused=on_gpu())


def cpu_adam(groups: list[dict]) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for CPUs.

    Raises:
        UserError: it is not compiled yet, and there is no compiler.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    try:
        return DeepSpeedCPUAdam(groups, betas=BETAS, adamw_mode=True)
    except RuntimeError as error:
        raise UserError("--offload needs DeepSpeed's optimizer for CPUs, which cannot be compiled here: install a C++ "
                        "compiler and ninja (on Debian and Ubuntu: apt install g++ ninja-build), or leave --offload "
                        f"out ({error.__cause__ or error})") from error


def build_scheduler(optimizer: torch.optim.Optimizer, name: str, warmup_steps: int, total_steps: int):
    """A transformers learning-rate schedule over `total_steps` optimizer steps."""
    from transformers import get_scheduler
    return get_scheduler(name, optimizer, num_warmup_steps=min(warmup_steps, total_steps),
                         num_training_steps=total_steps)
