"""Keeps optimizer states in CPU memory during a rollout, which needs the GPU's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, UntypedStorage

from common.runtime.distributed import device

_PART = 2**28  # bytes; torch rounds page-locked allocations up to a power of two


class OptimizerOffload:
    """Moves Adam's moments, 8 bytes for each trained weight, to CPU memory and back; at any ZeRO stage.

    DeepSpeed's `engine.offload_states` does this at stages 1 and 2, and at stage 3 for its own Adam only. Here every
    tensor keeps its storage object, which is emptied and refilled. So all views that DeepSpeed holds stay valid.

    Args:
        engines: the engines whose optimizer states are moved.
    """

    def __init__(self, engines: Sequence):
        self.engines = engines
        self.copies: list[Tensor] = []  # kept, since allocating page-locked memory is slow

    @contextlib.contextmanager
    def offloaded(self) -> Iterator[None]:
        """Within the context the states are empty; afterwards they are bit for bit what they were."""
        storages = self.storages()
        sizes, parts = [storage.nbytes() for storage in storages], _parts(storages)
        if list(map(len, parts)) != list(map(len, self.copies)):
            pinned = device().type == "cuda"
            self.copies = [torch.empty(len(part), dtype=torch.uint8, pin_memory=pinned) for part in parts]
        for part, copy in zip(parts, self.copies):
            copy.copy_(part)
        for storage in storages:
            storage.resize_(0)
        try:
            yield
        finally:
            for storage, size in zip(storages, sizes):
                storage.resize_(size)
            for part, copy in zip(_parts(storages), self.copies):
                part.copy_(copy)

    def storages(self) -> list[UntypedStorage]:
        """The storages of all optimizer states on this rank's device; before the first step there are none."""
        storages: dict[int, UntypedStorage] = {}
        for engine in self.engines:
            optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # DeepSpeed's own wraps the real one
            for state in optimizer.state.values():
                for tensor in state.values():
                    if torch.is_tensor(tensor) and tensor.dim() and tensor.device == device():
                        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return list(storages.values())


def _parts(storages: Sequence[UntypedStorage]) -> list[Tensor]:
    """All bytes of the storages, as views of up to `_PART` bytes each."""
    return [
        part
        for storage in storages
        for part in torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).split(_PART)
    ]
