"""Finds paths in an output directory that a run could not write: a folder where it needs a file, or the reverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import InputError

_FOLDERS = ("logs", "logs/tensorboard", "checkpoints", "samples", "adapter")
_FILES = (
    "provenance.json",
    "run_config.yaml",
    "logs/metrics.jsonl",
    "logs/run.lock",
    "logs/finished.json",
    "checkpoints/newest",
)
_OF_A_MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "provenance.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def check_nothing_in_the_way(output: Path, parts: Sequence[str] = ("",), rank: int = 0) -> None:
    """Check that each path that a run will write is free, or is of the right kind (file or folder).

    Args:
        parts: directories inside `output` where a model is written; `""` is `output` itself.
        rank: whose log file must be writable.

    Raises:
        InputError: one path is of the wrong kind.
    """
    files = [*_FILES, f"logs/libraries.rank{rank}.log", *(f"{part}/{name}" for part in parts for name in _OF_A_MODEL)]
    for obstacle, wanted in _obstacles(output, [*_FOLDERS, *parts], files):
        raise InputError(
            output,
            f"{obstacle} is in the way, where {wanted} must be: move it away, or choose another directory",
        )


def _obstacles(output: Path, folders: Sequence[str], files: Sequence[str]) -> Iterator[tuple[Path, str]]:
    for name in folders:
        if (path := output / name).exists() and not path.is_dir():
            yield path, "a folder"
    for name in files:
        if (path := output / name.lstrip("/")).is_dir():
            yield path, "a file"
