"""Keeps an exponential moving average of the trained weights in fp32, partitioned as the weights are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from common.runtime.distributed import rank


class EMA:
    """theta_ema <- decay theta_ema + (1 - decay) theta, once per optimizer step.

    Under ZeRO-3 every rank averages its own shards, so nothing is gathered.

    Args:
        module: the trained module, as its engine holds it; parameters without gradients are left alone.
        decay: per optimizer step, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._parameters: list[Any] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._average = [_local(parameter).float().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        for parameter, average in zip(self._parameters, self._average):
            average.lerp_(_local(parameter).float(), 1 - self.decay)

    def tensors(self) -> dict[str, torch.Tensor]:
        """This rank's part of the average, fp32; writing into these tensors changes the average."""
        return {f"ema.{number}": average for number, average in enumerate(self._average)}

    def reshape(self, parts_of: Callable[[str], list[torch.Tensor]]) -> None:
        """Set the average from a run on another number of ranks.

        Args:
            parts_of: maps a name in `tensors` to the parts of those ranks, in their order.
        """
        for (name, average), parameter in zip(self.tensors().items(), self._parameters):
            parts = parts_of(name)
            if hasattr(parameter, "ds_tensor"):
                # Shards have equal lengths, so the last ones are padded; the padding is never read.
                own = torch.cat(parts)[rank() * len(average) :][: len(average)]
                average[: len(own)].copy_(own)
            else:
                average.copy_(parts[0])

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the context the module's weights are the average; afterwards they are restored exactly."""
        for parameter in self._parameters:
            # ZeRO-3 also keeps small parameters unsharded. Without that copy, the shard is the only data.
            if hasattr(parameter, "ds_tensor") and parameter.numel() == parameter.ds_numel:
                parameter.partition()
        kept = [_local(parameter).clone() for parameter in self._parameters]
        try:
            self._write(self._average)
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values):
            _local(parameter).copy_(value)


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of a parameter: all of it, or its shard under ZeRO-3."""
    return getattr(parameter, "ds_tensor", parameter).detach()
