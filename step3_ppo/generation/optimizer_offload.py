"""Optimizer states in the CPU's memory while a rollout has use for the GPU's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, UntypedStorage

from common.runtime.distributed import device

_PART = 2**28  # bytes; torch rounds what it page-locks up to a power of two


class OptimizerOffload:
    """Moves Adam's moments, 8 bytes for each weight that learns, away and back; at any ZeRO stage.

    DeepSpeed's `engine.offload_states` does the like at stages 1 and 2, and at 3 for its own Adam alone. Here a tensor
    keeps its storage, which is only empty meanwhile: so every view of it that DeepSpeed has kept is right again after.

    Args:
        engines: those whose optimizer states go.
    """

    def __init__(self, engines: Sequence):
        self.engines = engines
        self.copies: list[Tensor] = []  # kept, since page-locked memory takes long to get

    @contextlib.contextmanager
    def offloaded(self) -> Iterator[None]:
        """Within the context the states hold nothing; after it they are bit for bit what they were."""
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
        """Those of all states that are on this rank's device; before the first step there are none."""
        storages: dict[int, UntypedStorage] = {}
        for engine in self.engines:
            optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # DeepSpeed's own wraps the real one
            for state in optimizer.state.values():
                for tensor in state.values():
                    if torch.is_tensor(tensor) and tensor.dim() and tensor.device == device():
                        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return list(storages.values())


def _parts(storages: Sequence[UntypedStorage]) -> list[Tensor]:
    """All bytes, as tensors over them of up to `_PART` each."""
    return [
        part
        for storage in storages
        for part in torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).split(_PART)
    ]
