"""Whether the result of this very run lies there already, so that the same command need not train it again."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from common.config import Config, options
from common.errors import Finished
from common.provenance import FILE as PROVENANCE_FILE

FILE = "logs/finished.json"  # in the output directory
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".py")


class Result:
    """The result of a run, by all that it depends on: configuration, data, batches, models that it starts from.

    Args:
        config: has `output_dir` and model names.
        depends_on: the rest, as JSON.
    """

    def __init__(self, config: Config, depends_on: dict):
        self.output, self.depends_on = Path(config.output_dir), depends_on
        self.models = {name: getattr(config, name) for name in options(type(config))
                       if name.endswith("model_name_or_path")}

    def raise_if_there(self) -> None:
        """Raises Finished if the output directory holds this result. Reads the models it starts from, if it may."""
        try:
            noted = json.loads((self.output / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        models = noted.pop("models", None) if isinstance(noted, dict) else None
        if noted == self.depends_on and (self.output / PROVENANCE_FILE).is_file() and models == self._digests():
            raise Finished(f"{self.output} holds the result of this command already; --resume never trains it again")

    def note(self) -> None:
        """From here on it is there. A disk that refuses costs no more than this note."""
        path = self.output / FILE
        new = path.with_suffix(".new")
        with contextlib.suppress(OSError):
            new.write_text(json.dumps({**self.depends_on, "models": self._digests()}, indent=1), encoding="utf-8")
            os.replace(new, path)

    def forget(self) -> None:
        """From here on it is being made."""
        (self.output / FILE).unlink(missing_ok=True)

    def _digests(self) -> dict[str, str | None]:
        return {name: model and _digest(Path(model).expanduser()) for name, model in self.models.items()}


def _digest(model: Path) -> str:
    """A hash of a model directory's content; of what is none, such as a hub name, the name."""
    if not model.is_dir():
        return str(model)
    whole = hashlib.sha256()
    for path in sorted(path for path in model.iterdir() if path.suffix in _MODEL_FILES):
        with open(path, "rb") as stream:
            whole.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
