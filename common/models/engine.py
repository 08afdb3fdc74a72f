"""The part of a DeepSpeed engine that this project uses, as a type; DeepSpeed itself has no types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Engine(Protocol):
    """A DeepSpeed engine around a model of transformers or a `ScoringModel`.

    Always call the engine, never a part of `module`: the hooks by which ZeRO-3 gathers weights sit on the whole model.

    Attributes:
        module: the model.
        optimizer: DeepSpeed's own around the optimizer of torch; for a model that is not trained None or, under
            ZeRO-3, a stand-in without an optimizer of torch.
        basic_optimizer: the optimizer of torch; None for a model that is not trained.
        lr_scheduler: the schedule of the learning rate; None for a model that is not trained.
        checkpoint_engine: writes and reads the files of a checkpoint.
        load_universal_checkpoint: whether `load_checkpoint` reads a universal checkpoint; may be replaced.
    """

    module: Any
    optimizer: Any
    basic_optimizer: Any
    lr_scheduler: Any
    checkpoint_engine: Any
    load_universal_checkpoint: Callable[[], bool]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""

    def train(self, mode: bool = True) -> Any:
        """Turn training mode on: dropout, gradient checkpointing."""

    def eval(self) -> Any:
        """Turn training mode off."""

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool = True) -> Any:
        """Add the gradients of a loss, a scalar; they become means over the ranks."""

    def step(self) -> Any:
        """Make an optimizer step with the gradients, and one of the schedule."""

    def zero_grad(self) -> None:
        """Discard the gradients of the parameters, but not those that `optimizer` holds."""

    def destroy(self) -> None:
        """Take hooks and buffers off the model."""

    def get_global_grad_norm(self) -> float | Tensor | None:
        """Norm of the last step's gradients over all ranks, before clipping; None where DeepSpeed keeps none."""

    def get_lr(self) -> list[float]:
        """The learning rates of the parameter groups."""

    def fp16_enabled(self) -> bool:
        """Whether it computes in fp16."""

    def bfloat16_enabled(self) -> bool:
        """Whether it computes in bf16."""

    def zero_optimization(self) -> bool:
        """Whether the stage is above 0."""

    def zero_optimization_stage(self) -> int:
        """0, 1, 2 or 3."""

    def zero_optimization_partition_weights(self) -> bool:
        """Whether the weights are partitioned over the ranks, as at stage 3."""

    def save_checkpoint(
        self, save_dir: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool
    ) -> bool | None:
        """Write weights, optimizer and schedule to the directory `tag` in `save_dir`."""

    def load_checkpoint(self, load_dir: str, *, tag: str, load_module_strict: bool) -> tuple[str | None, Any]:
        """Read what `save_checkpoint` wrote; returns the path, None if there is no such checkpoint."""

    def _zero3_consolidated_16bit_state_dict(self) -> dict[str, torch.Tensor] | None:
        """At stage 3 the whole state dict, on the CPU of rank 0; None on the other ranks."""
