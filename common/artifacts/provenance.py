"""Reads and writes provenance.json, which records how the model in an output directory was trained.

A model directory alone does not say which template and end token it was trained with, or on which scale its
scores lie. A step that starts from another step's output checks its provenance before it loads a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from common.data.split import check_eval_fraction, proportions
from common.errors import UserError, reason_of
from common.formats import check_format
from common.paths import from_anywhere

FILE = "provenance.json"
# Raised when a field changes its meaning or a new field is required. Files from before formats had numbers have none.
FORMAT = 1
_LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "datasets")


@dataclass(frozen=True)
class Provenance:
    """How a model was trained.

    Attributes:
        step: "sft", "reward" or "ppo".
        base: the model it was trained from; a directory by its absolute path, once written.
        tokenizer: fingerprint of the tokenizer, see `common.data.tokenization.tokenizer_fingerprint`.
        template: name of the template.
        template_date: the date that the chat template wrote, YYYY-MM-DD; '' for a template without a date.
        end_token, pad_token: the tokens' texts.
        data_path: the data sources; files and directories by their resolved paths.
        unsplit_data_path: sources that this step used as a whole, see --sft_only_data_path.
        data_split, eval_fraction, split_by: the rule that kept the steps' prompts apart, see
            `common.artifacts.split_rule`.
        shared_openings: by source, hashes of the openings (first user turns) that many dialogues share and that
            --split_by auto therefore keyed by more turns, see `common.data.openings.KeyRule`.
        score_mean, score_std: of a reward model's raw scores over held-out responses.
        versions: of the libraries used.
    """

    step: str
    base: str
    tokenizer: str
    template: str
    end_token: str
    pad_token: str
    data_split: str
    eval_fraction: float
    data_path: tuple[str, ...] = ()
    unsplit_data_path: tuple[str, ...] = ()
    template_date: str = ""
    split_by: str = "opening"  # for files without the field
    shared_openings: dict[str, list[int]] = field(default_factory=dict)
    score_mean: float | None = None
    score_std: float | None = None
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in _LIBRARIES})

    def write(self, directory: str | Path) -> None:
        """Write provenance.json into `directory`."""
        values = {"format": FORMAT, **asdict(self), "base": from_anywhere(self.base)}
        (Path(directory) / FILE).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_provenance(model: str | Path) -> Provenance | None:
    """The provenance of a model directory, or of the output directory it lies in; None for any other model.

    Raises:
        UserError: the file is damaged, or of another format.
    """
    if not Path(model).is_dir():  # a hub name
        return None
    for directory in (Path(model), Path(model).absolute().parent):
        path = directory / FILE
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
            if not isinstance(values, dict):
                raise ValueError("it is no object")
            advice = "use the version that wrote it, or train the model again"
            check_format(values, FORMAT, path, advice, unnumbered=1)
            return _checked(values)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path} is damaged ({reason_of(error)}): train the model again or remove the file"
            ) from None
    return None


def _checked(values: dict) -> Provenance:
    """Raises ValueError or TypeError for what no provenance holds; fields that are unknown are left out."""
    known = {item.name: item.default is MISSING and item.default_factory is MISSING for item in fields(Provenance)}
    if missing := [name for name, required in known.items() if required and name not in values]:
        raise ValueError(f"it has no {', no '.join(missing)}")
    provenance = Provenance(**{name: value for name, value in values.items() if name in known})
    for name, kind in get_type_hints(Provenance).items():
        if not _fits(getattr(provenance, name), kind):
            raise ValueError(f"{name} is {str(getattr(provenance, name))[:40]!r}")
    checks: dict[str, Callable[[Any], object]] = {"data_split": proportions, "eval_fraction": check_eval_fraction}
    for name, check in checks.items():
        try:
            check(getattr(provenance, name))
        except UserError as error:
            raise ValueError(f"{name} {error}") from None
    return provenance


def _fits(value: object, kind: Any) -> bool:
    """Whether a value from JSON has a field's type."""
    parts = get_args(kind)
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) in (tuple, list):
        return isinstance(value, list | tuple) and all(_fits(item, parts[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    if kind is float:
        return type(value) is float or type(value) is int and abs(value) < 2**63
    return type(value) is kind


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
