"""Records that a run is complete, so that the same command recognises its result and does not train again."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoints.config_changes import (
    batches_of_all_ranks,
    changed_pieces,
    config_of_result,
    in_this_version,
    unknown_options,
)
from common.config.groups import RunOptions
from common.config.parser import options
from common.formats import check_format
from common.paths import content_digest

FILE = "logs/finished.json"  # in the output directory
FORMAT = 1
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".py")


class CompletedRun:
    """The record of a completed run: everything that its result depends on, and the files of the result.

    Args:
        config: of the step.
        data: keys of the prepared data.
        pieces: see `Checkpoints`.
    """

    def __init__(self, config: RunOptions, data: Sequence[str], pieces: Mapping[str, str]):
        self.config, self.data, self.pieces = config, list(data), pieces
        self.path = Path(config.output_dir) / FILE

    def exists(self) -> bool:
        """Whether the output directory holds this result. The models that the run starts from are read only if
        everything else agrees."""
        recorded = self._read()
        if recorded is None:
            return False
        config = in_this_version(recorded["config"], self.config)
        try:
            return (
                all(config[name] == value for name, value in config_of_result(self.config).items())
                and recorded.get("batches") == batches_of_all_ranks(self.config)
                and recorded.get("data") == self.data
                and not changed_pieces(self.pieces, recorded["pieces"])
                and recorded.get("files") == self._files()
                and self._same_models(recorded["models"])
            )
        except OSError:
            return False

    def notes(self) -> list[str]:
        """What to tell of a record that another version of the project made."""
        recorded = self._read()
        return [] if recorded is None else unknown_options(recorded["config"], self.config, self.path)

    def check_format(self) -> None:
        """Raise InputError if another version of the project made the record. All ranks may call it."""
        self._read()

    def record(self) -> None:
        """Write the record. If the disk refuses, the same command will train again; that is all."""
        new = self.path.with_suffix(".new")
        with contextlib.suppress(OSError):
            values = {
                "format": FORMAT,
                "config": config_of_result(self.config),
                "batches": batches_of_all_ranks(self.config),
                "data": self.data,
                "pieces": self.pieces,
                "files": self._files(),
                "models": {name: model_digest(model) for name, model in self.config.models().items()},
            }
            new.write_text(json.dumps(values, indent=1), encoding="utf-8")
            os.replace(new, self.path)

    def clear(self) -> None:
        """Remove the record: a run begins to write into the output directory."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        """The record; None if there is none, or it is damaged. Raises InputError as `check_format`."""
        advice = "use the version that made it, or train again with this one, --resume never"
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                return None
            check_format(values, FORMAT, self.path, advice, unnumbered=FORMAT)
        except (OSError, ValueError, RecursionError):
            return None
        values.setdefault("pieces", {})  # earlier records have none
        return values if all(isinstance(values.get(name), dict) for name in ("config", "models", "pieces")) else None

    def _files(self) -> dict[str, int]:
        """The size of every model file of the result, and of its provenance."""
        output = Path(self.config.output_dir)
        return {
            str(path.relative_to(output)): path.stat().st_size
            for pattern in ("provenance.json", "*.safetensors", "*/*.safetensors")  # step 3 makes several models
            for path in output.glob(pattern)
        }

    def _same_models(self, recorded: Mapping[str, Any]) -> bool:
        """Whether the files of the models are those of the record. An option that it lacks had its default."""
        declared = options(type(self.config))
        return all(
            (recorded[name] if name in recorded else model_digest(declared[name].default)) == model_digest(model)
            for name, model in self.config.models().items()
            if name in recorded or name in declared
        )


def model_digest(model: str | None) -> str | None:
    """A hash of the files of a model directory; for anything else, such as a name on the hub, the name itself."""
    if not model or not Path(model).is_dir():
        return model and str(Path(model))
    files = (path for path in Path(model).iterdir() if path.suffix in _MODEL_FILES and path.is_file())
    return content_digest(sorted(files))
