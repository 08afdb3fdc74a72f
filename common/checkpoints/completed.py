"""Records that a run is complete, so that the same command recognises its result and does not train again."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from common.checkpoints.state import check_format
from common.config.groups import RunOptions
from common.config.parser import options
from common.paths import content_digest

FILE = "logs/finished.json"  # in the output directory
FORMAT = 1
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".py")


class CompletedRun:
    """The record of a completed run: everything that its result depends on, and the files of the result.

    Args:
        config: names the output directory and the models that the run starts from.
        depends_on: what else the result depends on, such as configuration and data, as JSON.
    """

    def __init__(self, config: RunOptions, depends_on: dict[str, Any]):
        self.output, self.depends_on = Path(config.output_dir), depends_on
        self.models: dict[str, str | None] = {
            name: getattr(config, name) for name, meta in options(type(config)).items() if meta.names_model
        }

    def exists(self) -> bool:
        """Whether the output directory holds this result. The models that the run starts from are read only if
        everything else agrees."""
        recorded = self._read()
        try:
            return (
                recorded is not None
                and all(recorded.get(name) == value for name, value in self.depends_on.items())
                and recorded.get("files") == self._files()
                and recorded.get("models") == self._digests()
            )
        except OSError:
            return False

    def check_format(self) -> None:
        """Raise InputError if another version of the project made the record. All ranks may call it."""
        recorded = self._read()
        if recorded is not None and "format" in recorded:
            advice = "use the version that made it, or train again with this one, --resume never"
            with contextlib.suppress(ValueError):  # a damaged record counts as missing
                check_format(recorded, FORMAT, self.output / FILE, advice)

    def record(self) -> None:
        """Write the record. A write error is ignored: its only effect is that the same command trains again."""
        path = self.output / FILE
        new = path.with_suffix(".new")
        with contextlib.suppress(OSError):
            values = {"format": FORMAT, **self.depends_on, "files": self._files(), "models": self._digests()}
            new.write_text(json.dumps(values, indent=1), encoding="utf-8")
            os.replace(new, path)

    def clear(self) -> None:
        """Remove the record, before a run writes into the output directory."""
        (self.output / FILE).unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        try:
            values = json.loads((self.output / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return values if isinstance(values, dict) else None

    def _files(self) -> dict[str, int]:
        """The size of every model file of the result, and of its provenance."""
        return {
            str(path.relative_to(self.output)): path.stat().st_size
            for pattern in ("provenance.json", "*.safetensors", "*/*.safetensors")  # step 3 makes several models
            for path in self.output.glob(pattern)
        }

    def _digests(self) -> dict[str, str | None]:
        return {name: model and _digest(Path(model)) for name, model in self.models.items()}


def _digest(model: Path) -> str:
    """A hash of the files of a model directory; for anything else, such as a name on the hub, the name itself."""
    if not model.is_dir():
        return str(model)
    return content_digest(sorted(path for path in model.iterdir() if path.suffix in _MODEL_FILES and path.is_file()))
