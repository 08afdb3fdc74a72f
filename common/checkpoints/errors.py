"""Defines the error of a checkpoint that cannot be used."""

from __future__ import annotations

from pathlib import Path

from common.errors import InputError


class CheckpointError(InputError):
    """A checkpoint that cannot be used. `Checkpoints` adds how to go on from another one, or without any.

    Args:
        cure: what else may help, for the message.
    """

    def __init__(self, path: Path, why: str, cure: str = ""):
        super().__init__(path, why)
        self.cure = cure
