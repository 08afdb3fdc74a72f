"""Optimizer states in the CPU's memory while a rollout has use for the GPU's."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, UntypedStorage

from common.distributed import device


class StatesAway:
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
    def away(self) -> Iterator[None]:
        """Within the context the states hold nothing; after it they are bit for bit what they were."""
        storages = self.storages()
        if [storage.nbytes() for storage in storages] != [len(copy) for copy in self.copies]:
            pinned = device().type == "cuda"
            self.copies = [torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned) for storage in storages]
        for storage, copy in zip(storages, self.copies):
            copy.copy_(_bytes_of(storage))
            storage.resize_(0)
        try:
            yield
        finally:
            for storage, copy in zip(storages, self.copies):
                storage.resize_(len(copy))
                _bytes_of(storage).copy_(copy)

    def storages(self) -> list[UntypedStorage]:
        """Those of all states that are on this rank's device; before the first step there are none."""
        found = {}
        for engine in self.engines:
            optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)  # DeepSpeed's own wraps the real one
            for state in optimizer.state.values():
                for tensor in state.values():
                    if torch.is_tensor(tensor) and tensor.dim() and tensor.device == device():
                        found.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return list(found.values())


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
