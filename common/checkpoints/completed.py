"""Whether the result of this very run lies there already, so that the same command need not train it again."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from common.config.parser import Config, options
from common.paths import content_digest

FILE = "logs/finished.json"  # in the output directory
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".py")


class CompletedRun:
    """The result of a run, by all that it depends on: configuration, data, batches, models that it starts from.

    Args:
        config: has `output_dir` and model names.
        depends_on: the rest, as JSON.
    """

    def __init__(self, config: Config, depends_on: dict):
        self.output, self.depends_on = Path(config.output_dir), depends_on
        self.models = {
            name: getattr(config, name) for name in options(type(config)) if name.endswith("model_name_or_path")
        }

    def exists(self) -> bool:
        """Whether the output directory holds this result. Reads the models that it starts from, if it may be so."""
        try:
            noted = json.loads((self.output / FILE).read_text(encoding="utf-8"))
            return (
                isinstance(noted, dict)
                and all(noted.get(name) == value for name, value in self.depends_on.items())
                and noted.get("files") == self._files()
                and noted.get("models") == self._digests()
            )
        except (OSError, ValueError, RecursionError):
            return False

    def record(self) -> None:
        """From here on it is there. A disk that refuses costs no more than this note."""
        path = self.output / FILE
        new = path.with_suffix(".new")
        with contextlib.suppress(OSError):
            values = {**self.depends_on, "files": self._files(), "models": self._digests()}
            new.write_text(json.dumps(values, indent=1), encoding="utf-8")
            os.replace(new, path)

    def clear(self) -> None:
        """From here on it is being made."""
        (self.output / FILE).unlink(missing_ok=True)

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
    """A hash of a model directory's content; of what is none, such as a hub name, the name."""
    if not model.is_dir():
        return str(model)
    return content_digest(sorted(path for path in model.iterdir() if path.suffix in _MODEL_FILES and path.is_file()))
